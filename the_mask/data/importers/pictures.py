"""Masks stored as pictures: colour masks with a table, CVAT's "Segmentation mask 1.1", DAVIS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from the_mask.data.class_table import NO_CLASS, Color, read_class_table
from the_mask.data.files import read_lines
from the_mask.data.importers.common import NOTHING, ImportReport, LabelledFrame, Labels, check_names, find_image
from the_mask.data.io import IMAGE_SUFFIXES, read_image, read_label_raw, read_palette
from the_mask.data.registry import natural_key


def color_labels(pixels: np.ndarray, table: Mapping[Color, int], path: Path, report: ImportReport) -> np.ndarray:
    """Turn a colour mask [H, W, 3] into a label map.

    Raises:
        ValueError: a colour that is not in the table.
    """
    packed = (pixels.astype(np.int64) @ np.array([65536, 256, 1])).astype(np.int64)
    values, inverse = np.unique(packed, return_inverse=True)
    indices = []
    for value in values:
        color = (int(value) >> 16, int(value) >> 8 & 255, int(value) & 255)
        if color not in table:
            count = int((packed == value).sum())
            raise ValueError(
                f"{path}: colour {color} ({count} pixels) is not in the table of classes; a mask that was scaled or "
                "saved as JPEG has such colours"
            )
        indices.append(table[color])
    return np.array(indices, np.int32)[inverse].reshape(packed.shape)


def read_color_masks(source: Path, frames: Path | None = None, table: Path | None = None) -> Labels:
    """Read a folder of colour masks and a table ``class, r, g, b`` (CSV, with or without a header).

    Args:
        source: folder of masks (PNG), in sub-folders by video or flat.
        frames: folder of pictures under the same names; ``source/../frames`` by default.
        table: CSV file; ``source/classes.csv`` by default. Colours of classes named "void", "ignore" or "unlabelled"
            mean no class.

    Raises:
        FileNotFoundError, ValueError: something is missing, damaged or not in the table; the message names it.
    """
    table = table or source / "classes.csv"
    colors = read_class_table(table)
    return _color_tree(source, frames or source.parent / "frames", colors, str(table), NO_CLASS)


def read_cvat_masks(source: Path, frames: Path | None = None) -> Labels:
    """Read CVAT's "Segmentation mask 1.1": ``labelmap.txt``, ``SegmentationClass/`` and, if saved, ``JPEGImages/``.

    Args:
        source: unpacked export.
        frames: folder of the pictures, when they were not saved with it.

    Raises: see :func:`read_color_masks`.
    """
    path = source / "labelmap.txt"
    colors = []
    for line in read_lines(path, "CVAT's labelmap"):
        if line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        parts = rest.split(":")[0].split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"{path}: expected label:r,g,b:parts:actions, got {line!r}")
        colors.append((name.strip(), (int(parts[0]), int(parts[1]), int(parts[2]))))
    return _color_tree(
        source / "SegmentationClass", frames or source / "JPEGImages", colors, str(path), frozenset({"background"})
    )


def _color_tree(
    masks: Path, frames: Path, colors: list[tuple[str, Color]], where: str, ignored: frozenset[str]
) -> Labels:
    names = check_names([name for name, _ in colors if name.lower() not in ignored], where)
    table: dict[Color, int] = {}
    for name, color in colors:
        index = NOTHING if name.lower() in ignored else names.index(name)
        if table.setdefault(color, index) != index:
            raise ValueError(f"{where}: colour {color} stands for two classes, {name} is one of them")
    report = ImportReport()

    def read() -> Iterator[LabelledFrame]:
        for path in _pictures(masks):
            relative = path.relative_to(masks)
            video = relative.parent.as_posix() if relative.parent.parts else masks.parent.name
            image = find_image(frames, relative.as_posix(), str(path))
            yield LabelledFrame(video, path.stem, image, color_labels(read_image(path), table, path, report))

    own = [next(color for other, color in colors if other == name) for name in names]
    return Labels(names, own, read(), report)


def read_davis(source: Path, frames: Path | None = None, names: list[str] | None = None) -> Labels:
    """Read DAVIS: ``Annotations/<resolution>/<video>/*.png`` with a palette, ``JPEGImages/<resolution>/<video>/*.jpg``.

    Args:
        source: folder that holds both.
        frames: another folder of pictures, with a folder per video.
        names: of values 1, 2, ... ; by default "object 1", ... as many as the largest value. Value 0 is "background".

    Raises: see :func:`read_color_masks`.
    """
    masks = _only_folder(source / "Annotations")
    images = frames or _only_folder(source / "JPEGImages")
    paths = list(_pictures(masks))
    if names is None:
        largest = max((int(read_label_raw(path).max()) for path in paths), default=0)
        names = [f"object {i + 1}" for i in range(largest)]
    names = ["background", *names]
    colors = read_palette(paths[0])[: len(names)]

    def read() -> Iterator[LabelledFrame]:
        for path in paths:
            values = read_label_raw(path).astype(np.int32)
            # 255 is the border that DAVIS leaves open.
            values[values == 255] = NOTHING
            if values.max() >= len(names):
                raise ValueError(
                    f"{path}: value {values.max()}, but there are {len(names)} classes: {', '.join(names)}"
                )
            relative = path.relative_to(masks)
            yield LabelledFrame(
                relative.parent.as_posix(), path.stem, find_image(images, relative.as_posix(), str(path)), values
            )

    return Labels(check_names(names, source), colors if len(colors) == len(names) else None, read())


def _only_folder(folder: Path) -> Path:
    """The one sub-folder of a folder (DAVIS names it by the resolution), or the folder when it holds several videos."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist")
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    resolutions = [path for path in inner if path.name.endswith("p") or path.name == "Full-Resolution"]
    if len(resolutions) > 1:
        raise ValueError(f"{folder} holds {', '.join(path.name for path in resolutions)}; keep one")
    return resolutions[0] if resolutions else folder


def _pictures(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"folder of masks {folder} does not exist")
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not paths:
        raise FileNotFoundError(f"{folder} holds no masks")
    yield from sorted(paths, key=lambda path: [natural_key(part) for part in path.relative_to(folder).parts])
