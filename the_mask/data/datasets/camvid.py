"""CamVid, 11-class release: driving videos whose labelled frames are about one second apart.

``datasets/prepare_camvid.py`` sorts the release into one folder per sequence; with ``--frames`` it also decodes the
frames before each labelled one, as temporal models need them.

``camvid_val`` continues a training sequence (0016E5), so it says little about other streets. For that the training set
is also registered by sequence: train on ``camvid_train_without_0006R0``, evaluate on ``camvid_0006R0``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from the_mask.data.classes import load_class_list
from the_mask.data.registry import Problem, TreeScan, register_tree
from the_mask.data.video_tree import VideoTree, register_video_tree

FIX = "run datasets/prepare_camvid.py --source DIR (see datasets/README.md), or set DETECTRON2_DATASETS"
FRAMES_FIX = "run datasets/prepare_camvid.py --source DIR --frames VIDEOS (see datasets/README.md)"
TRAIN_SEQUENCES = ("0001TP", "0006R0", "0016E5")


@dataclass(frozen=True)
class SequenceTree(VideoTree):
    """A subset of a split's sequences.

    Attributes:
        sequences: their folders.
    """

    sequences: tuple[str, ...] = ()

    def scan(self) -> TreeScan:
        whole = super().scan()
        scan = TreeScan([r for r in whole.records if r["video_id"] in self.sequences], whole.problems)
        for sequence in sorted(set(self.sequences) - {record["video_id"] for record in scan.records}):
            folder = self.root / self.split / sequence
            scan.problems.append(Problem("missing video", str(folder), f"{self.name} needs sequence {sequence}"))
        return scan


class FrameTree(VideoTree):
    """Every frame of a split as a video of one frame, for ``INPUT.PSEUDO_CLIP``."""

    def scan(self) -> TreeScan:
        whole = super().scan()
        records = [
            {**record, "video_id": f"{record['video_id']}/{frame['frame_id']}", "frames": [frame]}
            for record in whole.records
            for frame in record["frames"]
        ]
        return TreeScan(records, whole.problems)


def register_camvid(root: str | Path) -> None:
    """Register ``camvid_{train,val,test}`` at ``root``, and ``camvid_frames_...`` with memory frames next to it.

    For each training sequence S also ``camvid_S`` and ``camvid_train_without_S``; ``camvid_train_frames`` is
    ``camvid_train`` as single images.
    """
    frames = Path(root).with_name("camvid_frames")
    classes = load_class_list("camvid")
    for split in ("train", "val", "test"):
        register_video_tree(f"camvid_{split}", root, split, classes, fix=FIX)
        register_video_tree(f"camvid_frames_{split}", frames, split, classes, require_labels=False, fix=FRAMES_FIX)
    register_tree(FrameTree("camvid_train_frames", Path(root), "train", classes, fix=FIX))
    for held_out in TRAIN_SEQUENCES:
        others = tuple(sequence for sequence in TRAIN_SEQUENCES if sequence != held_out)
        for name, sequences in ((f"camvid_{held_out}", (held_out,)), (f"camvid_train_without_{held_out}", others)):
            register_tree(SequenceTree(name, Path(root), "train", classes, fix=FIX, sequences=sequences))
