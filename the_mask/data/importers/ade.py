"""The full ADE20K, with its thousands of classes: a picture of class numbers and a JSON file of names for each one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from the_mask.data.files import parse_json
from the_mask.data.importers.common import (
    NOTHING,
    ImportReport,
    LabelledFrame,
    Labels,
    Pictures,
    check_names,
    find_image,
)
from the_mask.data.io import read_image
from the_mask.data.registry import natural_key

SEGMENTATION = "_seg.png"


def read_ade(source: Path, frames: Path | Pictures | None = None, names: list[str] | None = None) -> Labels:
    """Read ADE20K as of 2021: ``X.jpg``, ``X.json`` and ``X_seg.png``, whose class number is 256 (r // 10) + g.

    Args:
        source: folder; all of its sub-folders are looked through.
        frames: folder of the images; next to the masks by default.
        names: classes in their order, others are no class and counted; by default all that occur, by their number.

    Raises:
        ValueError: a damaged file, one number with two names. FileNotFoundError: a JSON file or picture is missing.
    """
    masks = sorted(source.rglob(f"*{SEGMENTATION}"), key=lambda path: natural_key(path.relative_to(source).as_posix()))
    if not masks:
        raise FileNotFoundError(f"{source} holds no *{SEGMENTATION}")
    by_mask = {mask: _names(mask.with_name(mask.name.removesuffix(SEGMENTATION) + ".json")) for mask in masks}
    numbers: dict[int, str] = {}
    for mask, own in by_mask.items():
        for number, name in own.items():
            if numbers.setdefault(number, name) != name:
                raise ValueError(f"{mask}: class {number} is {name!r} here and {numbers[number]!r} elsewhere")
    classes = check_names(names or [numbers[number] for number in sorted(numbers)], source)
    index = {number: classes.index(name) for number, name in numbers.items() if name in classes}
    report = ImportReport()

    def read() -> Iterator[LabelledFrame]:
        for mask in masks:
            pixels = read_image(mask).astype(np.int32)
            values, inverse = np.unique(256 * (pixels[..., 0] // 10) + pixels[..., 1], return_inverse=True)
            unknown = [int(value) for value in values if value and int(value) not in by_mask[mask]]
            if unknown:
                raise ValueError(f"{mask}: classes {unknown[:5]} have no name in its JSON file")
            table = np.array([index.get(int(value), NOTHING) for value in values], np.int32)
            labels = table[inverse].reshape(pixels.shape[:2])
            others = int(((labels == NOTHING) & (values[inverse].reshape(labels.shape) != 0)).sum())
            if others:
                report.noticed["pixels of classes that are not asked for"] += others
            relative = mask.relative_to(source)
            name = relative.name.removesuffix(SEGMENTATION)
            picture = find_image(frames or source, relative.with_name(f"{name}.jpg").as_posix(), str(mask))
            yield LabelledFrame(relative.parent.as_posix(), name, picture, labels)

    return Labels(classes, None, read(), report)


def _names(path: Path) -> dict[int, str]:
    """Class numbers and names of one picture's JSON file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist, which names the classes of its mask") from error
    # Free text in some of the release's files is Latin-1; names of classes are ASCII.
    content = parse_json(data.decode("latin-1"), str(path))
    annotation = content.get("annotation") if isinstance(content, Mapping) else None
    objects = annotation.get("object") if isinstance(annotation, Mapping) else None
    if not isinstance(objects, list):
        raise ValueError(f"{path} is not a file of ADE20K: it lacks a list under annotation, object")
    result = {}
    for number, item in enumerate(objects):
        key, name = (item.get("name_ndx"), item.get("name")) if isinstance(item, Mapping) else (None, None)
        if type(key) is not int or not isinstance(name, str) or not name:
            raise ValueError(f"{path}, object {number}: expected name_ndx and name")
        result[key] = name
    return result
