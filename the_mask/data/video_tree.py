"""Video data sets as folder trees, read as one record per video.

There are two layouts; the first is used when ``<root>/<split>.txt`` exists:

* VSPW: ``<split>.txt`` lists video ids, which may be paths (``cam1/0007``); files in ``data/<video>/origin/*`` and
  ``data/<video>/mask/*.png``;
* folders: ``<split>/<video>/origin/*`` and ``<split>/<video>/mask/*.png``.

An image and its mask share the file stem. A file that looks like a frame or a mask but is not read is a problem, and so
are two files of one frame. Folders are enumerated, so frame numbers may have gaps; time order is the order of the
stems, with numbers compared as numbers. Entries whose name starts with a dot are skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from the_mask.data.classes import ClassList, as_label_table, make_class_list
from the_mask.data.files import read_lines, relative_name
from the_mask.data.frame_files import files_by_stem
from the_mask.data.registry import (
    IMAGE_SUFFIXES,
    MASK_SUFFIX,
    DataTree,
    Problem,
    Record,
    TreeScan,
    natural_key,
    register_tree,
    visible,
)

__all__ = ["IMAGE_SUFFIXES", "Record", "VideoTree", "as_class_list", "natural_key", "register_video_tree"]


@dataclass(frozen=True)
class VideoTree(DataTree):
    """One split (``<split>.txt`` or folder ``<split>``) of a data set with a folder per video."""

    def scan(self) -> TreeScan:
        return scan_video_tree(self)


def register_video_tree(
    name: str,
    root: str | Path,
    split: str,
    classes: ClassList | Sequence[str],
    label_table: Sequence[int] | Mapping[int, int] | None = None,
    *,
    require_labels: bool = True,
    fix: str = "",
) -> VideoTree:
    """Register a folder tree with ``DatasetCatalog`` and ``MetadataCatalog``. Nothing is read before it is used.

    Registering the same name again with this function replaces it.

    Args:
        name: catalogue name, e.g. ``"mine_train"``.
        root: folder of the data set.
        split: ``train`` means ``<root>/train.txt`` (VSPW layout) or ``<root>/train/`` (folder layout).
        classes: class names in the order of their train ids, or a ready :class:`ClassList`.
        label_table: raw PNG value -> train id, the ignore label (255, or 65535 with more than 255 classes), or -1 for
            illegal; a list indexed by the value, or a mapping. ``None`` with plain names means: PNG value = train id,
            255 ignored.
        require_labels: a frame without a mask is an error; switch off for test splits and sparse labels.
        fix: sentence shown when the tree is missing.

    Raises:
        ValueError: bad class list or label table.
    """
    class_list = as_class_list(classes, label_table)
    tree = VideoTree(name, Path(root), split, class_list, require_labels, fix)
    register_tree(tree)
    return tree


def as_class_list(
    classes: ClassList | Sequence[str], label_table: Sequence[int] | Mapping[int, int] | None
) -> ClassList:
    """A class list from names or from a ready list, with ``label_table`` in place of its own if given."""
    class_list = classes if isinstance(classes, ClassList) else make_class_list(classes)
    return class_list if label_table is None else replace(class_list, label_table=as_label_table(label_table))


def scan_video_tree(tree: DataTree) -> TreeScan:
    """Enumerate a tree without reading any image.

    Raises:
        FileNotFoundError: neither the list file nor the folder of the split exists.
    """
    if not tree.root.is_dir():
        raise tree.missing(f"folder {tree.root} does not exist")
    list_file, folder = tree.root / f"{tree.split}.txt", tree.root / tree.split
    scan = TreeScan()
    if list_file.is_file():
        videos = _listed(list_file, scan)
        parent, origin = tree.root / "data", str(list_file)
    elif folder.is_dir():
        videos = sorted((p.name for p in visible(folder) if p.is_dir()), key=natural_key)
        parent, origin = folder, str(folder)
    else:
        raise tree.missing(f"neither {list_file} nor {folder}/ exists")
    if not videos and not scan.problems:
        scan.problems.append(Problem("empty split", origin, "names no video"))
    for video in sorted({v for v in videos if videos.count(v) > 1}) if len(set(videos)) < len(videos) else []:
        scan.problems.append(Problem("repeated video", origin, f"video {video} is listed more than once"))
    for video in dict.fromkeys(videos):
        _scan_video(tree, video, parent / video, scan)
    return scan


def _listed(list_file: Path, scan: TreeScan) -> list[str]:
    """The videos in a list file, each a normalised path below ``data/``."""
    videos = []
    for line in read_lines(list_file, "list of videos"):
        try:
            videos.append(relative_name(line, "video"))
        except ValueError as error:
            scan.problems.append(Problem("bad name", str(list_file), str(error)))
    return videos


def _scan_video(tree: DataTree, video: str, folder: Path, scan: TreeScan) -> None:
    """Append the record of one video, or its problems."""
    if not folder.is_dir():
        scan.problems.append(
            Problem("missing video", str(folder), f"folder of a video of split {tree.split} is missing")
        )
        return
    images, problems = files_by_stem(folder / "origin", IMAGE_SUFFIXES, "frame")
    scan.problems += problems
    if not images:
        scan.problems.append(Problem("empty video", str(folder / "origin"), "holds no image"))
        return
    masks, problems = files_by_stem(folder / "mask", (MASK_SUFFIX,), "mask", images)
    scan.problems += problems
    frames = []
    for stem, image in images.items():
        mask = masks.pop(stem, None)
        if mask is None and tree.require_labels:
            scan.problems.append(Problem("missing mask", str(image), f"no mask/{stem}{MASK_SUFFIX}"))
        frames.append({"frame_id": stem, "file_name": str(image), "sem_seg_file_name": str(mask) if mask else None})
    for path in masks.values():
        scan.problems.append(Problem("mask without image", str(path), "belongs to no image in origin/"))
    scan.records.append({"dataset": tree.name, "video_id": video, "frames": frames})
