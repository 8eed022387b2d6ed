"""Write the labelled frames of an importer as a folder tree for training."""

from __future__ import annotations

import glob
import inspect
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from the_mask.data.archives import opened_zip
from the_mask.data.classes import distinct_colors
from the_mask.data.files import atomic_write, inside, relative_name, write_inside, write_json
from the_mask.data.importers.ade import read_ade
from the_mask.data.importers.coco import read_cityscapes_vps, read_coco, read_panoptic, read_vipseg, read_ytvis
from the_mask.data.importers.common import NOTHING, ImportReport, LabelledFrame, Labels
from the_mask.data.importers.cvat import read_cvat_images, read_cvat_video
from the_mask.data.importers.pictures import (
    read_color_masks,
    read_cvat_masks,
    read_davis,
    read_id_masks,
    read_mapillary,
    read_video,
)
from the_mask.data.importers.shapes import read_label_studio, read_labelme
from the_mask.data.importers.video import OpenVideo, Sampling, VideoPictures
from the_mask.data.io import check_same_size, read_image, write_picture
from the_mask.data.registry import natural_key
from the_mask.data.whole_folder import require_new, whole_folder

FORMATS: dict[str, Callable[..., Labels]] = {
    "ids": read_id_masks,
    "colors": read_color_masks,
    "cvat-masks": read_cvat_masks,
    "cvat-images": read_cvat_images,
    "cvat-video": read_cvat_video,
    "davis": read_davis,
    "mapillary": read_mapillary,
    "ade": read_ade,
    "coco": read_coco,
    "panoptic": read_panoptic,
    "cityscapes-vps": read_cityscapes_vps,
    "vipseg": read_vipseg,
    "ytvis": read_ytvis,
    "labelme": read_labelme,
    "label-studio": read_label_studio,
    "video": read_video,
}
# Formats of pictures that are no frames.
STILLS = ("ade", "mapillary")
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
    val_videos: float | Sequence[str] = 0.2,
    options: Mapping[str, Any] | None = None,
    video: str | Path | None = None,
    sampling: Sampling | None = None,
    open_video: OpenVideo | None = None,
    stills: bool | None = None,
) -> ImportReport:
    """Read a data set of another tool and write it as a tree, a list per split, and a module that registers it.

    Frames are copied byte for byte, or decoded from videos. Masks hold class indices and 255 (65535 with more than 255
    classes) where there is no class. The tree appears when it is complete.

    Args:
        source: folder, file, or a .zip of them.
        format: one of :data:`FORMATS`.
        output: a new or empty folder.
        name: of the data set; that of the output folder by default.
        val_videos: the videos for validation, or their share of the labelled frames: those from the last on that come
            nearest to it, at least one if there are two. If only one video has labels, it is cut in time: its last
            labelled frames, and what lies between them, are for validation.
        options: further arguments of the format's function (``frames``, ``masks``, ``table``, ``names``).
        video: a video, or a folder of videos, that the frames are taken from; their names end with their number.
        sampling: which frames are taken besides the labelled ones.
        open_video: how to read a video.
        stills: the pictures do not follow each other: every one is a video of its own. Default: for Mapillary and ADE.

    Returns:
        Counts, and what was noticed.

    Raises:
        ValueError, FileNotFoundError: unknown format or option, a damaged source, sizes that differ; the file is named.
        FileExistsError: the output is not empty, or a mount point.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    if isinstance(val_videos, (int, float)) and not 0 <= val_videos < 1:
        raise ValueError(f"share of frames for validation {val_videos}: expected 0 or more and less than 1")
    reader = FORMATS[format]
    given = {key: value for key, value in (options or {}).items() if value is not None}
    unknown = sorted(set(given) - set(inspect.signature(reader).parameters))
    if unknown:
        raise ValueError(f"format {format} takes no {', '.join(unknown)}")
    source, output = Path(source), Path(output)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    require_new(output)
    if format == "video":
        video = source
    if video is None and sampling is not None:
        raise ValueError("frames are sampled from a video, and none is given (--video)")
    if video is not None and "frames" in given:
        raise ValueError(f"frames come from the folder {given['frames']} or from the video {video}, not from both")
    name = name or output.resolve().name
    with ExitStack() as stack:
        tree = stack.enter_context(whole_folder(output, new=True))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=tree)))
        root = source
        if source.suffix.lower() == ".zip" and format != "video":
            # Under the archive's name, which may become that of a video.
            unpack(source, scratch / "source" / source.stem)
            root = _content_of(scratch / "source" / source.stem, format, source)
        pictures = None
        if video is not None:
            if open_video is None:
                raise ValueError(f"video {video}: nothing is given that can read it (open_video)")
            pictures = given["frames"] = VideoPictures(
                Path(video), scratch / "frames", open_video, sampling or Sampling()
            )
        labels = reader(root, **given)
        report, written = labels.report, _Written(tree, 255 if len(labels.names) <= 255 else 65535, scratch)
        alone = format in STILLS if stills is None else stills
        for frame in labels.frames if pictures is None else _with_video(labels, pictures):
            written.add(replace(frame, video=f"{frame.video}/{frame.name}") if alone else frame)
            report.frames += 1
            report.labelled += frame.labels is not None
        if not report.frames:
            raise ValueError(f"{source} holds no frames")
        report.videos = len(written.videos)
        mixed = sum(len(sizes) > 1 for sizes in written.sizes.values())
        if mixed:
            report.noticed["videos whose labelled frames differ in size"] = mixed
        report.splits = _write_lists(written, val_videos)
        colors = labels.colors or distinct_colors(len(labels.names))
        content = {"names": labels.names, "colors": [list(color) for color in colors], "ignore": written.ignore}
        write_json(tree / "classes.json", content)
        module = "".join(c if c.isalnum() or c in "_-" else "_" for c in name)
        atomic_write(tree / "dataset.py", _DATASET.format(name=module, source=format).encode())
        shutil.rmtree(scratch)
    return report


def _with_video(labels: Labels, pictures: VideoPictures) -> Iterator[LabelledFrame]:
    """Labelled frames under the numbers that they have in their videos, and the frames between them."""
    seen: dict[str, set[int]] = {}
    for frame in labels.frames:
        number = int(frame.image.stem)
        if frame.video not in seen and seen and pictures.videos.is_file():
            raise ValueError(
                f"the labels are of several videos ({next(iter(seen))}, {frame.video}), and {pictures.videos} is one: "
                "give the folder of the videos"
            )
        numbers = seen.setdefault(frame.video, set())
        if frame.labels is not None:
            numbers.add(number)
            yield replace(frame, name=f"{number:08d}")
    names = pictures.names()
    for name in seen or names:
        for number, path in pictures.rest(name):
            if number not in seen.get(name, ()):
                yield LabelledFrame(name, f"{number:08d}", path, None)
    if pictures.videos.is_dir() and seen:
        without = len(set(names) - set(seen))
        if without:
            labels.report.noticed["videos without a label, left out"] = without


class _Written:
    """Writes frames of a tree, and keeps the names of videos and frames."""

    def __init__(self, tree: Path, ignore: int, scratch: Path) -> None:
        self.tree, self.ignore, self.scratch = tree, ignore, scratch
        # Of each video its frames, and whether they are labelled.
        self.videos: dict[str, dict[str, bool]] = {}
        self.sizes: dict[str, set[tuple[int, ...]]] = {}

    def add(self, frame: LabelledFrame) -> None:
        video = relative_name(frame.video, "video")
        frames = self.videos.setdefault(video, {})
        if frame.name in frames:
            raise ValueError(f"{frame.image}: video {video} has two frames named {frame.name}")
        frames[frame.name] = frame.labels is not None
        origin = inside(self.tree, f"data/{video}/origin/{frame.name}{frame.image.suffix.lower()}")
        origin.parent.mkdir(parents=True, exist_ok=True)
        if frame.labels is not None:
            check_same_size(read_image(frame.image), frame.labels, frame.image, f"annotation of {frame.image.name}")
            self.sizes.setdefault(video, set()).add(frame.labels.shape)
            values = np.where(frame.labels == NOTHING, self.ignore, frame.labels)
            target = inside(self.tree, f"data/{video}/mask/{frame.name}.png")
            write_picture(target, values.astype(np.uint8 if self.ignore == 255 else np.uint16), durable=False)
        if frame.image.is_relative_to(self.scratch):
            frame.image.replace(origin)
        else:
            shutil.copyfile(frame.image, origin)


def _write_lists(written: _Written, val: float | Sequence[str]) -> dict[str, tuple[list[str], int]]:
    """Write the list of each split; returns its videos and labelled frames."""
    splits: dict[str, tuple[list[str], int]] = {}
    if isinstance(val, (int, float)):
        labelled = {video: sum(frames.values()) for video, frames in written.videos.items()}
        counts = labelled if any(labelled.values()) else {video: len(f) for video, f in written.videos.items()}
        only = [video for video, count in counts.items() if count]
        chosen = {*_cut_off_end(written, only[0], val)} if val and len(only) == 1 else choose_videos(counts, val)
    else:
        unknown = [name for name in val if name not in written.videos]
        if unknown:
            raise ValueError(f"no video {unknown[0]!r} for validation; there are {', '.join(written.videos)[:500]}")
        chosen = {*val}
    if len(chosen) == len(written.videos):
        raise ValueError(f"all videos ({', '.join(chosen)[:500]}) are for validation, and none is left for training")
    for split in ("train", "val"):
        names = [video for video in written.videos if (video in chosen) == (split == "val")]
        if names:
            atomic_write(written.tree / f"{split}.txt", "".join(f"{video}\n" for video in names).encode())
            splits[split] = names, sum(sum(written.videos[video].values()) for video in names)
    return splits


def choose_videos(counts: Mapping[str, int], share: float) -> set[str]:
    """Videos whose frames come near to a share of all: from the last on, each that brings the sum closer.

    At least one video with frames is chosen, and one is left, if there are two of them.

    Args:
        counts: frames of each video, in order.
        share: 0..1; 0 chooses none.
    """
    videos = [video for video in counts if counts[video]]
    if not share or len(videos) < 2:
        return set()
    wanted, total, chosen = share * sum(counts.values()), 0, set[str]()
    for video in reversed(videos):
        closer = abs(total + counts[video] - wanted) < abs(total - wanted)
        if closer and len(chosen) < len(videos) - 1:
            chosen.add(video)
            total += counts[video]
    return chosen or {min(reversed(videos), key=lambda video: counts[video])}


def _cut_off_end(written: _Written, video: str, share: float) -> list[str]:
    """Move the last frames of a video into a new one; returns its name, or nothing with too few labels."""
    names = sorted(written.videos[video], key=natural_key)
    labelled = [name for name in names if written.videos[video][name]] or names
    if len(labelled) < 2:
        return []
    first = labelled[-max(1, round(share * len(labelled)))]
    end, folder = f"{video}_end", written.tree / "data" / video
    for name in names[names.index(first) :]:
        for path in [*(folder / "origin").glob(f"{glob.escape(name)}.*"), folder / "mask" / f"{name}.png"]:
            if path.is_file():
                target = written.tree / "data" / end / path.parent.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
        written.videos.setdefault(end, {})[name] = written.videos[video].pop(name)
    return [end]


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip archive whose names stay inside the folder.

    Raises:
        ValueError: damaged, a name that leads out of the folder, or far more content than an archive of this size can
            hold.
    """
    try:
        with opened_zip(archive, MOST_EXPANSION, ALWAYS_ALLOWED) as file:
            for info in file.infolist():
                if not info.is_dir():
                    with file.open(info) as content:
                        copy = partial(shutil.copyfileobj, content)
                        write_inside(folder, info.filename, content=copy, durable=False)
    except (ValueError, NotADirectoryError, IsADirectoryError) as error:  # a member that lies in another one
        raise ValueError(f"{archive}: {error}") from error


def _content_of(folder: Path, format: str, archive: Path) -> Path:
    """What a format's reader expects of an unpacked archive: the folder, or the only JSON or XML file in it."""
    if format in ("ade", "colors", "cvat-masks", "davis", "ids", "labelme", "mapillary"):
        return folder
    suffix = ".xml" if format in ("cvat-images", "cvat-video") else ".json"
    found = sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())
    if len(found) != 1:
        names = ", ".join(path.relative_to(folder).as_posix() for path in found[:5])
        raise ValueError(f"{archive} holds {len(found)} {suffix} files ({names[:200]}); unpack it and name one")
    return found[0]
