"""Stored label maps, and the classes that their values mean."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from detectron2.data import MetadataCatalog

from the_mask.data.class_table import is_no_class, read_class_table
from the_mask.data.classes import ClassList, make_class_list
from the_mask.data.exporters.common import LabelFrame
from the_mask.data.files import read_json
from the_mask.data.io import IMAGE_SUFFIXES, read_label, read_size
from the_mask.data.registry import natural_key, require_known

# Written by the-mask predict (the_mask.evaluation.claims).
INDEX = "predictions.json"


def dataset_classes(name: str, values: str = "train-ids") -> ClassList:
    """Classes of a registered data set, for PNGs of train ids or of its ``raw`` values.

    Raises:
        ValueError: unknown name or kind of values.
    """
    if values not in ("train-ids", "raw"):
        raise ValueError(f"values {values!r}: expected train-ids or raw")
    require_known(name)
    metadata = MetadataCatalog.get(name)
    names, colors = list(metadata.stuff_classes), [tuple(color) for color in metadata.stuff_colors]
    if values == "raw":
        return ClassList(tuple(names), tuple(colors), metadata.label_table, metadata.ignore_label)
    return make_class_list(names, void_values=[metadata.ignore_label], colors=colors)


def given_classes(text: str) -> ClassList:
    """Classes from a table (see :func:`read_class_table`), or from their names, ``a,b,c``.

    Raises:
        ValueError, FileNotFoundError: no such file, a damaged one, or a class twice; the file is named.
    """
    path = Path(text)
    if path.suffix.lower() not in (".json", ".csv"):
        names = [name.strip() for name in text.split(",")]
        return make_class_list(names, void_values=[_ignore(len(names))])
    table = [(name, color) for name, color in read_class_table(path) if not is_no_class(name)]
    try:
        names, colors = [name for name, _ in table], [color for _, color in table]
        return make_class_list(names, void_values=[_ignore(len(names))], colors=colors)
    except ValueError as error:
        raise ValueError(f"classes {path}: {error}") from error


def _ignore(num_classes: int) -> int:
    return 255 if num_classes <= 255 else 65535


def stored_classes(folder: Path) -> ClassList | None:
    """The classes named by files in the folder: ``classes.json``, or the record of ``the-mask predict``; else None."""
    if (folder / "classes.json").is_file():
        return given_classes(str(folder / "classes.json"))
    if not (folder / INDEX).is_file():
        return None
    content = read_json(folder / INDEX)
    return dataset_classes(str(content.get("dataset")), str(content.get("values")))


def read_predictions(
    folder: Path, classes: ClassList, frames: Path | None = None, suffix: str = ".jpg"
) -> Iterator[LabelFrame]:
    """Read PNGs ``<folder>/<video>/<frame>.png``, or all in the folder itself, which then is the video.

    Args:
        folder: as ``the-mask predict`` and ``the-mask segment`` write it.
        classes: class list; its label table maps the stored values to train ids.
        frames: folder of the pictures, ``<video>/<frame>.*``, ``<video>/origin/<frame>.*`` or ``<frame>.*``. If given,
            exported files use its names, and sizes are compared.
        suffix: of image names if ``frames`` is not given.

    Raises:
        FileNotFoundError: no such folder, no PNG, no picture for one.
        ValueError: a damaged PNG, values that are not in the table, a picture of another size; the file is named.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder of predictions {folder} does not exist")
    relative = [path.relative_to(folder) for path in folder.rglob("*.png") if path.is_file()]
    relative = [path for path in relative if not any(part.startswith(".") for part in path.parts)]
    if not relative:
        raise FileNotFoundError(f"{folder} holds no PNGs of predictions; expected {folder}/<video>/<frame>.png")
    # Videos one after the other, even if one is inside the folder of another.
    for path in sorted(
        relative, key=lambda path: ([natural_key(p) for p in path.parent.parts], natural_key(path.name))
    ):
        labels = read_label(folder / path, classes.label_table)
        video = path.parent.as_posix() if path.parent.parts else folder.resolve().name
        picture = f"{video}/{path.stem}{suffix}"
        if frames is not None:
            found = _picture(frames, video, path.stem, folder / path)
            picture = found.relative_to(frames).as_posix()
            size = read_size(found)
            if size != labels.shape:
                raise ValueError(
                    f"{folder / path} is {labels.shape[0]}x{labels.shape[1]} (height x width), its picture {found} "
                    f"{size[0]}x{size[1]}"
                )
        yield LabelFrame(video, path.stem, labels, picture)


def _picture(frames: Path, video: str, name: str, prediction: Path) -> Path:
    for place in (frames / video, frames / video / "origin", frames):
        for suffix in IMAGE_SUFFIXES:
            for candidate in (place / f"{name}{suffix}", place / f"{name}{suffix.upper()}"):
                if candidate.is_file():
                    return candidate
    raise FileNotFoundError(
        f"{prediction}: {frames} holds no picture {video}/{name}.*, {video}/origin/{name}.* or {name}.*"
    )
