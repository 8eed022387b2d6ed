"""Video data sets as folder trees: what is on disk becomes one record per video.

Two layouts are understood, told apart by whether ``<root>/<split>.txt`` exists:

* VSPW: ``<split>.txt`` lists video ids; files in ``data/<video>/origin/*`` and ``data/<video>/mask/*.png``;
* folders: ``<split>/<video>/origin/*`` and ``<split>/<video>/mask/*.png``.

An image and its mask share the file stem. Folders are enumerated, so frames need not be numbered without gaps; time
order is the order of the stems, numbers compared as numbers. Entries whose name starts with a dot are skipped.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from the_mask.data.classes import ClassList, make_class_list

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MASK_SUFFIX = ".png"
Record = dict[str, Any]


@dataclass(frozen=True)
class VideoTree:
    """One split of a data set on disk.

    Attributes:
        name: name in ``DatasetCatalog``.
        root: folder of the data set.
        split: name of the split (``<split>.txt`` or folder ``<split>``).
        class_list: classes and label table.
        require_labels: every frame must have a mask.
        fix: what to do when the tree is missing, shown in errors.
    """

    name: str
    root: Path
    split: str
    class_list: ClassList
    require_labels: bool = True
    fix: str = ""


@dataclass(frozen=True)
class Problem:
    """Something wrong with a data set: what kind, where, and in words."""

    kind: str
    file: str
    message: str


@dataclass
class TreeScan:
    """Records of a tree (videos without frames left out) and everything wrong with its structure."""

    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


# Problems of structure that leave the records usable.
HARMLESS = {"mask without image"}
_TREES: dict[str, VideoTree] = {}


def register_video_tree(
    name: str,
    root: str | Path,
    split: str,
    classes: ClassList | Sequence[str],
    label_table: Sequence[int] | None = None,
    *,
    require_labels: bool = True,
    fix: str = "",
) -> VideoTree:
    """Make a folder tree known to ``DatasetCatalog`` and ``MetadataCatalog``; nothing is read before it is used.

    Registering a name of this function again replaces it.

    Args:
        name: catalogue name, e.g. ``"mine_train"``.
        root: folder of the data set.
        split: ``train`` means ``<root>/train.txt`` (VSPW layout) or ``<root>/train/`` (folder layout).
        classes: class names in the order of their train ids, or a ready :class:`ClassList`.
        label_table: raw PNG value -> train id, the ignore label (255, or 65535 with more than 255 classes), or -1 for
            illegal. ``None`` with plain names means: PNG value = train id, 255 ignored.
        require_labels: a frame without a mask is an error; switch off for test splits and sparse labels.
        fix: sentence shown when the tree is missing.

    Raises:
        ValueError: bad class list or label table.
    """
    class_list = classes if isinstance(classes, ClassList) else make_class_list(classes)
    if label_table is not None:
        class_list = ClassList(class_list.names, class_list.colors, tuple(label_table), class_list.ignore_label)
    tree = VideoTree(name, Path(root), split, class_list, require_labels, fix)
    if name in _TREES:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: load_video_tree(tree))
    MetadataCatalog.get(name).set(
        stuff_classes=list(class_list.names),
        stuff_colors=[list(color) for color in class_list.colors],
        ignore_label=class_list.ignore_label,
        label_table=list(class_list.label_table),
        evaluator_type="video_sem_seg",
        dataset_root=str(tree.root),
    )
    _TREES[name] = tree
    return tree


def registered_tree(name: str) -> VideoTree | None:
    """The tree behind a catalogue name, or None when the name was registered by other means."""
    return _TREES.get(name)


def get_records(name: str) -> list[Record]:
    """Records of a registered data set.

    Raises:
        ValueError: unknown name (the known ones are listed), or a defect of the tree.
        FileNotFoundError: the tree is missing; the message says how to make it.
    """
    require_known(name)
    records = DatasetCatalog.get(name)
    if not records:
        raise ValueError(f"data set {name} holds no video")
    return records


def get_class_names(name: str) -> list[str]:
    """Class names of a registered data set, index = train id.

    Raises:
        ValueError: unknown name.
    """
    require_known(name)
    return list(MetadataCatalog.get(name).stuff_classes)


def require_known(name: str) -> None:
    """Raise ValueError when no data set of this name is registered; the video data sets that are get listed."""
    known = list(DatasetCatalog.list())
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        videos = [n for n in known if MetadataCatalog.get(n).get("evaluator_type") == "video_sem_seg"]
        raise ValueError(f"unknown data set {name!r}{hint}; known video data sets: {', '.join(sorted(videos))}")


def load_video_tree(tree: VideoTree) -> list[Record]:
    """Records of a tree, one per video: ``{"dataset", "video_id", "frames": [{"frame_id", "file_name",
    "sem_seg_file_name"}, ...]}``; ``sem_seg_file_name`` is None for a frame without a mask.

    Raises:
        FileNotFoundError: the tree is missing.
        ValueError: an empty video, a missing video folder, a frame without a mask, two images of one frame. The first
            defects are named; ``tools/check_dataset.py`` lists all of them.
    """
    scan = scan_video_tree(tree)
    problems = [p for p in scan.problems if p.kind not in HARMLESS]
    if problems:
        shown = "; ".join(f"{p.file}: {p.message}" for p in problems[:5])
        raise ValueError(
            f"data set {tree.name} has {len(problems)} defects: {shown}{'; ...' if len(problems) > 5 else ''}"
            f" (tools/check_dataset.py {tree.name} lists all)"
        )
    return scan.records


def scan_video_tree(tree: VideoTree) -> TreeScan:
    """Enumerate a tree without reading any image.

    Raises:
        FileNotFoundError: neither the list file nor the folder of the split exists.
    """
    fix = f"; {tree.fix}" if tree.fix else ""
    if not tree.root.is_dir():
        raise FileNotFoundError(f"data set {tree.name}: folder {tree.root} does not exist{fix}")
    list_file, folder = tree.root / f"{tree.split}.txt", tree.root / tree.split
    scan = TreeScan()
    if list_file.is_file():
        lines = list_file.read_text(encoding="utf-8").split("\n")
        videos = [line.strip() for line in lines if line.strip()]
        parent, origin = tree.root / "data", str(list_file)
    elif folder.is_dir():
        videos = sorted((p.name for p in _visible(folder) if p.is_dir()), key=natural_key)
        parent, origin = folder, str(folder)
    else:
        raise FileNotFoundError(f"data set {tree.name}: neither {list_file} nor {folder}/ exists{fix}")
    if not videos:
        scan.problems.append(Problem("empty split", origin, "names no video"))
    for video in sorted({v for v in videos if videos.count(v) > 1}) if len(set(videos)) < len(videos) else []:
        scan.problems.append(Problem("repeated video", origin, f"video {video} is listed more than once"))
    for video in dict.fromkeys(videos):
        _scan_video(tree, parent / video, scan)
    return scan


def _scan_video(tree: VideoTree, folder: Path, scan: TreeScan) -> None:
    """Append the record of one video, or say what is wrong with it."""
    if not folder.is_dir():
        scan.problems.append(
            Problem("missing video", str(folder), f"folder of a video of split {tree.split} is missing")
        )
        return
    images: dict[str, Path] = {}
    for path in _visible(folder / "origin"):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if path.stem in images:
            scan.problems.append(Problem("repeated frame", str(path), f"same frame as {images[path.stem].name}"))
        images.setdefault(path.stem, path)
    if not images:
        scan.problems.append(Problem("empty video", str(folder / "origin"), "holds no image"))
        return
    masks = {path.stem: path for path in _visible(folder / "mask") if path.suffix.lower() == MASK_SUFFIX}
    frames = []
    for stem in sorted(images, key=natural_key):
        mask = masks.pop(stem, None)
        if mask is None and tree.require_labels:
            scan.problems.append(Problem("missing mask", str(images[stem]), f"no mask/{stem}{MASK_SUFFIX}"))
        frames.append(
            {"frame_id": stem, "file_name": str(images[stem]), "sem_seg_file_name": str(mask) if mask else None}
        )
    for path in masks.values():
        scan.problems.append(Problem("mask without image", str(path), "belongs to no image in origin/"))
    scan.records.append({"dataset": tree.name, "video_id": folder.name, "frames": frames})


def _visible(folder: Path) -> list[Path]:
    """Entries of a folder whose name does not start with a dot, by name; nothing when there is no such folder."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []


def natural_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that compares runs of digits as numbers: ``f9`` before ``f10``."""
    parts = re.findall(r"\d+|\D+", text)
    return tuple((0, int(p), p) if p.isdigit() else (1, 0, p) for p in parts)
