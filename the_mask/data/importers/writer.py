"""Write the labelled frames of an importer as a folder tree for training."""

from __future__ import annotations

import glob
import inspect
import io
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from the_mask.data.classes import distinct_colors
from the_mask.data.files import atomic_write, inside, relative_name, write_json
from the_mask.data.importers.coco import read_coco, read_panoptic, read_vipseg, read_ytvis
from the_mask.data.importers.common import NOTHING, ImportReport, LabelledFrame, Labels
from the_mask.data.importers.pictures import read_color_masks, read_cvat_masks, read_davis
from the_mask.data.importers.shapes import read_cvat_video, read_label_studio, read_labelme
from the_mask.data.io import check_same_size, read_image

FORMATS: dict[str, Callable[..., Labels]] = {
    "colors": read_color_masks,
    "cvat-masks": read_cvat_masks,
    "cvat-video": read_cvat_video,
    "davis": read_davis,
    "coco": read_coco,
    "panoptic": read_panoptic,
    "vipseg": read_vipseg,
    "ytvis": read_ytvis,
    "labelme": read_labelme,
    "label-studio": read_label_studio,
}
# Limit of what an archive may unpack to, as a multiple of its own size.
MOST_EXPANSION = 200
ALWAYS_ALLOWED = 1 << 26
_DATASET = '''"""Registers {name}_train and {name}_val, imported from {source}; name this file in DATASETS.IMPORT."""

import json
from pathlib import Path

from the_mask.data import register_video_tree
from the_mask.data.classes import make_class_list

ROOT = Path(__file__).resolve().parent
_classes = json.loads((ROOT / "classes.json").read_text(encoding="utf-8"))
for _split in [split for split in ("train", "val") if (ROOT / f"{{split}}.txt").is_file()]:
    register_video_tree(
        f"{name}_{{_split}}",
        ROOT,
        _split,
        make_class_list(
            _classes["names"], void_values=[_classes["ignore"]], colors=list(map(tuple, _classes["colors"]))
        ),
        require_labels=False,
    )
'''


def import_dataset(
    source: str | Path,
    format: str,
    output: str | Path,
    *,
    name: str = "",
    val_videos: float = 0.2,
    options: Mapping[str, Any] | None = None,
) -> ImportReport:
    """Read a data set of another tool and write it as a tree, a list per split, and a module that registers it.

    Frames are copied byte for byte. Masks hold class indices and 255 (65535 with more than 255 classes) where there is
    no class.

    Args:
        source: folder, file, or a .zip of them.
        format: one of :data:`FORMATS`.
        output: a new or empty folder.
        name: of the data set; that of the output folder by default.
        val_videos: share of the videos for validation, at least one if there are two; the last ones in order. A data
            set of one video is cut in time: its last frames are for validation.
        options: further arguments of the format's function (``frames``, ``masks``, ``table``, ``names``).

    Returns:
        Counts, and what was noticed.

    Raises:
        ValueError, FileNotFoundError: unknown format or option, a damaged source, sizes that differ; the file is named.
        FileExistsError: the output is not empty.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    if not 0 <= val_videos < 1:
        raise ValueError(f"share of videos for validation {val_videos}: expected 0 or more and less than 1")
    reader = FORMATS[format]
    given = {key: value for key, value in (options or {}).items() if value is not None}
    unknown = sorted(set(given) - set(inspect.signature(reader).parameters))
    if unknown:
        raise ValueError(f"format {format} takes no {', '.join(unknown)}")
    source, output = Path(source), Path(output)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is there already and not empty: name a new folder")
    name = name or output.name
    with ExitStack() as stack:
        root = source
        if source.suffix.lower() == ".zip":
            # Under the archive's name, which may become that of a video.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / source.stem
            unpack(source, folder)
            root = _content_of(folder, format)
        labels = reader(root, **given)
        ignore = 255 if len(labels.names) <= 255 else 65535
        report, written = labels.report, _Written()
        for frame in labels.frames:
            _write_frame(output, frame, ignore, written)
            report.frames += 1
            report.labelled += frame.labels is not None
    if not report.frames:
        raise ValueError(f"{source} holds no frames")
    report.videos = len(written.videos)
    _write_lists(output, written, val_videos)
    colors = labels.colors or distinct_colors(len(labels.names))
    write_json(output / "classes.json", {"names": labels.names, "colors": [list(c) for c in colors], "ignore": ignore})
    module = "".join(c if c.isalnum() or c in "_-" else "_" for c in name)
    atomic_write(output / "dataset.py", _DATASET.format(name=module, source=format).encode())
    return report


class _Written:
    """Videos and the names of their frames, in order."""

    def __init__(self) -> None:
        self.videos: dict[str, list[str]] = {}


def _write_frame(output: Path, frame: LabelledFrame, ignore: int, written: _Written) -> None:
    video = relative_name(frame.video, "video")
    names = written.videos.setdefault(video, [])
    if frame.name in names:
        raise ValueError(f"{frame.image}: video {video} has two frames named {frame.name}")
    names.append(frame.name)
    origin = inside(output, f"data/{video}/origin/{frame.name}{frame.image.suffix.lower()}")
    origin.parent.mkdir(parents=True, exist_ok=True)
    if frame.labels is not None:
        check_same_size(read_image(frame.image), frame.labels, frame.image, f"annotation of {frame.image.name}")
        kind = np.uint8 if ignore == 255 else np.uint16
        values = np.where(frame.labels == NOTHING, ignore, frame.labels).astype(kind)
        target = inside(output, f"data/{video}/mask/{frame.name}.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, format="PNG")
        atomic_write(target, buffer.getvalue())
    shutil.copyfile(frame.image, origin)


def _write_lists(output: Path, written: _Written, share: float) -> None:
    videos = list(written.videos)
    if share and len(videos) == 1 and len(written.videos[videos[0]]) > 1:
        videos.append(_cut_off_end(output, videos[0], written.videos[videos[0]], share))
    count = min(max(1, round(share * len(videos))), len(videos) - 1) if share else 0
    for split, names in {"train": videos[: len(videos) - count], "val": videos[len(videos) - count :]}.items():
        if names:
            atomic_write(output / f"{split}.txt", "".join(f"{video}\n" for video in names).encode())


def _cut_off_end(output: Path, video: str, names: list[str], share: float) -> str:
    """Move the last frames of the only video into a new video."""
    end = f"{video}_end"
    folder = output / "data" / video
    for name in names[-max(1, round(share * len(names))) :]:
        for path in [*(folder / "origin").glob(f"{glob.escape(name)}.*"), folder / "mask" / f"{name}.png"]:
            if path.is_file():
                target = output / "data" / end / path.parent.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
    return end


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip archive whose names stay inside the folder.

    Raises:
        ValueError: damaged, a name that leads out of the folder, or far more content than an archive of this size can
            hold.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            size = sum(info.file_size for info in file.infolist())
            if size > MOST_EXPANSION * archive.stat().st_size + ALWAYS_ALLOWED:
                raise ValueError(f"{archive} has {archive.stat().st_size} bytes and claims to hold {size}")
            for info in file.infolist():
                if info.is_dir():
                    continue
                try:
                    target = inside(folder, info.filename)
                except ValueError as error:
                    raise ValueError(f"{archive}: {error}") from error
                target.parent.mkdir(parents=True, exist_ok=True)
                with file.open(info) as content, open(target, "wb") as out:
                    shutil.copyfileobj(content, out)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{archive} is not a zip archive, or damaged: {error}") from error


def _content_of(folder: Path, format: str) -> Path:
    """What a format's reader expects of an unpacked archive: the folder, or the only JSON or XML file in it."""
    if format in ("colors", "cvat-masks", "davis", "labelme"):
        return folder
    suffix = ".xml" if format == "cvat-video" else ".json"
    found = sorted(path for path in folder.rglob(f"*{suffix}"))
    if len(found) != 1:
        names = ", ".join(path.relative_to(folder).as_posix() for path in found[:5])
        raise ValueError(f"the archive holds {len(found)} {suffix} files ({names}); unpack it and name one")
    return found[0]
