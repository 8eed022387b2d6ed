"""Data sets by name: their records and their metadata (classes, label table).

A record is one video: ``{"dataset", "video_id", "frames": [{"frame_id", "file_name", "sem_seg_file_name"}, ...]}`` with
frames in time order; an image is a video of one frame, and ``sem_seg_file_name`` is None for a frame without a mask.
``video_id`` is the video's normalised path relative to the data set; predictions are stored under it.
"""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from the_mask.data.classes import ClassList
from the_mask.data.files import relative_name
from the_mask.data.io import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from the_mask.data.io import read_label_raw

MASK_SUFFIX = ".png"
# Masks read before a data set is used, to recognise masks of a related data set by their values.
PROBES = 16
Record = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """A defect of a data set: its kind, the file, and a message."""

    kind: str
    file: str
    message: str


@dataclass
class TreeScan:
    """Records of a tree (without empty videos) and all problems of its structure."""

    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class DataTree(ABC):
    """One split of a data set on disk, in some layout.

    Attributes:
        name: name in ``DatasetCatalog``.
        root: folder of the data set.
        split: name of the split.
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

    @abstractmethod
    def scan(self) -> TreeScan:
        """Enumerate the tree.

        Raises:
            FileNotFoundError: the tree does not exist.
        """

    def inspect(self, records: Sequence[Record]) -> list[Problem]:
        """Read up to :data:`PROBES` masks, spread evenly, if the class list can recognise related data sets."""
        explain = self.class_list.explain_values
        masks = [frame["sem_seg_file_name"] for record in records for frame in record["frames"]]
        masks = [mask for mask in masks if mask is not None]
        if explain is None or not masks:
            return []
        chosen = sorted({round(i * (len(masks) - 1) / (PROBES - 1)) for i in range(PROBES)})
        values: set[int] = set()
        for i in chosen:
            try:
                values.update(np.unique(read_label_raw(masks[i])).tolist())
            except (ValueError, FileNotFoundError) as error:
                return [Problem("unreadable mask", masks[i], str(error))]
        text = explain(values, len(chosen))
        return [Problem("foreign masks", str(Path(masks[0]).parent), text)] if text else []

    def missing(self, what: str) -> FileNotFoundError:
        """The error for a missing part that the data set needs."""
        return FileNotFoundError(f"data set {self.name}: {what}{f'; {self.fix}' if self.fix else ''}")


# Structural problems that do not affect the records.
HARMLESS = {"mask without image"}
_TREES: dict[str, DataTree] = {}


def register_tree(tree: DataTree) -> None:
    """Register a tree with ``DatasetCatalog`` and ``MetadataCatalog``. Nothing is read before it is used.

    A name that was registered here is replaced; one that was registered elsewhere is an error of Detectron2.
    """
    name, class_list = tree.name, tree.class_list
    if name in _TREES:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: load_tree(tree))
    MetadataCatalog.get(name).set(
        stuff_classes=list(class_list.names),
        stuff_colors=[list(color) for color in class_list.colors],
        ignore_label=class_list.ignore_label,
        label_table=class_list.label_table,
        explain_values=class_list.explain_values,
        evaluator_type="video_sem_seg",
        dataset_root=str(tree.root),
    )
    _TREES[name] = tree


def registered_tree(name: str) -> DataTree | None:
    """The tree behind a catalogue name, or None when the name was registered by other means."""
    return _TREES.get(name)


def get_records(name: str) -> list[Record]:
    """Records of a registered data set.

    Raises:
        ValueError: unknown name (the known ones are listed), a defect of the tree, or bad or repeated ids.
        FileNotFoundError: the tree is missing; the message says how to make it.
    """
    require_known(name)
    records = DatasetCatalog.get(name)
    if not records:
        raise ValueError(f"data set {name} holds no video")
    return _identified(name, records)


def _identified(name: str, records: list[Record]) -> list[Record]:
    """Normalise the video ids of records. Equal ids are refused: they would overwrite each other's predictions."""
    result: dict[str, Record] = {}
    for record in records:
        video = relative_name(record["video_id"], f"data set {name}: video")
        frames = [frame["frame_id"] for frame in record["frames"]]
        if video in result:
            raise ValueError(f"data set {name}: two videos are called {video}; their ids must differ")
        if len(set(frames)) < len(frames):
            twice = next(frame for frame in frames if frames.count(frame) > 1)
            raise ValueError(f"data set {name}: video {video} has two frames called {twice}; their ids must differ")
        result[video] = {**record, "video_id": video}
    return list(result.values())


def get_class_names(name: str) -> list[str]:
    """Class names of a registered data set, index = train id.

    Raises:
        ValueError: unknown name.
    """
    require_known(name)
    return list(MetadataCatalog.get(name).stuff_classes)


def require_known(name: str) -> None:
    """Raise ValueError if no data set of this name is registered; the message lists the registered ones."""
    known = list(DatasetCatalog.list())
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        videos = [n for n in known if MetadataCatalog.get(n).get("evaluator_type") == "video_sem_seg"]
        raise ValueError(
            f"unknown data set {name!r}{hint}; known video data sets: {', '.join(sorted(videos))}. "
            "DATASETS.IMPORT names modules that register others"
        )


def load_tree(tree: DataTree) -> list[Record]:
    """Records of a tree, one per video.

    Raises:
        FileNotFoundError: the tree is missing.
        ValueError: an empty video, a missing video folder, a frame without a mask, two images of one frame, ... The
            first defects are named; ``tools/check_dataset.py`` lists all of them.
    """
    scan = tree.scan()
    problems = [p for p in scan.problems if p.kind not in HARMLESS] or tree.inspect(scan.records)
    if problems:
        shown = "; ".join(f"{p.file}: {p.message}" for p in problems[:5])
        raise ValueError(
            f"data set {tree.name} has {len(problems)} defects: {shown}{'; ...' if len(problems) > 5 else ''}"
            f" (`the-mask check {tree.name}` lists all)"
        )
    return scan.records


def visible(folder: Path) -> list[Path]:
    """Entries of a folder whose name does not start with a dot, sorted by name; empty when there is no such folder."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []


def natural_key(text: str) -> tuple[tuple[int, int, str, str], ...]:
    """Sort key that compares numbers as numbers: ``f9`` before ``f10``, and ``t0.25`` before ``t0.5``.

    One point between digits makes a decimal number (a time in seconds); with several, as in a date or a version, each
    run of digits is a number of its own. Digits are the decimal ones of any script; signs such as ``²`` are letters.
    """
    key: list[tuple[int, int, str, str]] = []
    for part in re.findall(r"\d+(?:\.\d+)*|\D+", text):
        if not part[0].isdecimal():
            key.append((1, 0, "", part))
        elif part.count(".") == 1:
            whole, _, fraction = part.partition(".")
            key.append((0, int(whole), fraction, part))
        else:
            key += [(0, int(number), "", number) for number in part.split(".")]
    return tuple(key)
