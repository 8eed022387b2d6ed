"""Masks stored as pictures: colour masks with a table, CVAT's "Segmentation mask 1.1", DAVIS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from the_mask.data.class_table import Color, is_no_class, read_class_table
from the_mask.data.files import parse_count, read_lines
from the_mask.data.importers.common import (
    MOST_CLASSES,
    NOTHING,
    ImportReport,
    LabelledFrame,
    Labels,
    Pictures,
    check_names,
    find_image,
)
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


def read_color_masks(source: Path, frames: Path | Pictures | None = None, table: Path | None = None) -> Labels:
    """Read a folder of colour masks and a table of the classes' colours.

    Args:
        source: folder of masks (PNG), in sub-folders by video or flat.
        frames: folder of pictures under the same names; ``source/../frames`` by default.
        table: see :func:`the_mask.data.class_table.read_class_table`; ``source/classes.csv`` by default. Colours of
            classes named "void", "ignore" or "unlabelled" mean no class.

    Raises:
        FileNotFoundError, ValueError: something is missing, damaged or not in the table; the message names it.
    """
    if table is None and not (source / "classes.csv").is_file():
        raise FileNotFoundError(f"{source} has no classes.csv: name a table of lines class,r,g,b (--table FILE)")
    table = table or source / "classes.csv"
    colors = read_class_table(table)
    return _color_tree(source, frames or source.parent / "frames", colors, str(table), is_no_class)


def read_cvat_masks(source: Path, frames: Path | Pictures | None = None) -> Labels:
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
        color = [parse_count(part.strip(), 255) for part in rest.split(":")[0].split(",")]
        red, green, blue = color if len(color) == 3 else [None] * 3
        if red is None or green is None or blue is None:
            raise ValueError(f"{path}: expected label:r,g,b:parts:actions with numbers 0..255, got {line[:200]!r}")
        colors.append((name.strip(), (red, green, blue)))
    return _color_tree(
        source / "SegmentationClass",
        frames or source / "JPEGImages",
        colors,
        str(path),
        lambda name: name.lower() == "background",
    )


def _color_tree(
    masks: Path, frames: Path | Pictures, colors: list[tuple[str, Color]], where: str, ignored: Callable[[str], bool]
) -> Labels:
    names = check_names([name for name, _ in colors if not ignored(name)], where)
    table: dict[Color, int] = {}
    for name, color in colors:
        index = NOTHING if ignored(name) else names.index(name)
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


def read_id_masks(source: Path, frames: Path | Pictures | None = None, names: list[str] | None = None) -> Labels:
    """Read a folder of PNGs of class ids, such as ``the-mask segment`` writes: 0..K-1, and 255 or 65535 for no class.

    Args:
        source: folder of masks, in sub-folders by video or flat.
        frames: folder of pictures under the same names; ``source/../frames`` by default.
        names: K class names; by default those of ``source/classes.json``.

    Raises: see :func:`read_color_masks`.
    """
    colors = None
    if names is None:
        if not (source / "classes.json").is_file():
            raise FileNotFoundError(
                f"{source} has no classes.json: name the classes of ids 0, 1, ... (--classes A,B,...)"
            )
        table = read_class_table(source / "classes.json")
        names, colors = [name for name, _ in table], [color for _, color in table]
    classes = check_names(names, source)
    return _index_tree(source, frames or source.parent / "frames", {i: i for i in range(len(classes))}, classes, colors)


def read_mapillary(source: Path, frames: Path | Pictures | None = None, table: Path | None = None) -> Labels:
    """Read Mapillary Vistas: ``labels/*.png`` of class indices, ``images/*.jpg``, and the release's config as table.

    Args:
        source: one split: a folder with ``labels`` (version 1.2) or ``v2.0/labels``, and ``images``.
        frames: another folder of pictures.
        table: ``config_v1.2.json`` or ``config_v2.0.json``; by default the one next to the split or above it.

    Raises: see :func:`read_color_masks`.
    """
    masks = next((path for path in (source / "labels", *sorted(source.glob("v*/labels"))) if path.is_dir()), None)
    if masks is None:
        raise FileNotFoundError(f"{source} holds no labels/ and no v2.0/labels/ with masks of Mapillary Vistas")
    version = f"config_{masks.parent.name if masks.parent != source else 'v1.2'}.json"
    places = [source / version, source.parent / version]
    table = table or next((place for place in places if place.is_file()), places[1])
    rows = read_class_table(table)
    kept = [i for i, (name, _) in enumerate(rows) if not is_no_class(name)]
    classes = check_names([rows[i][0] for i in kept], table)
    index = {i: kept.index(i) if i in kept else NOTHING for i in range(len(rows))}
    return _index_tree(masks, frames or source / "images", index, classes, [rows[i][1] for i in kept])


def _index_tree(
    masks: Path, frames: Path | Pictures, index: Mapping[int, int], names: list[str], colors: list[Color] | None
) -> Labels:
    def read() -> Iterator[LabelledFrame]:
        for path in _pictures(masks):
            raw = read_label_raw(path)
            values, inverse = np.unique(raw, return_inverse=True)
            table = [index.get(int(value), NOTHING) for value in values]
            unknown = [int(v) for v in values if int(v) not in index and int(v) not in (255, 65535)]
            if unknown:
                raise ValueError(
                    f"{path}: values {unknown[:5]} are no class; there are {len(index)}: {', '.join(names)}"
                )
            labels = np.array(table, np.int32)[inverse]
            relative = path.relative_to(masks)
            video = relative.parent.as_posix() if relative.parent.parts else masks.resolve().name
            image = find_image(frames, relative.as_posix(), str(path))
            yield LabelledFrame(video, path.stem, image, labels.reshape(raw.shape))

    return Labels(names, colors, read())


def read_video(source: Path, frames: Pictures | None = None, names: list[str] | None = None) -> Labels:
    """Read videos without annotation: all of their frames come from sampling.

    Args:
        source: a video, or a folder of videos.
        frames: given by :func:`import_dataset`.
        names: the classes that are meant to be labelled.

    Raises:
        ValueError: no class names.
    """
    if not names:
        raise ValueError(f"{source}: name the classes (--classes), which a video does not do")
    return Labels(check_names(names, source), None, iter(()))


def read_davis(source: Path, frames: Path | Pictures | None = None, names: list[str] | None = None) -> Labels:
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
        largest = max((_largest_object(path) for path in paths), default=0)
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


def _largest_object(path: Path) -> int:
    values = read_label_raw(path)
    largest = int(values[values != 255].max(initial=0))
    if largest >= MOST_CLASSES:
        raise ValueError(f"{path}: object {largest}; at most {MOST_CLASSES - 1} fit into a mask")
    return largest


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
