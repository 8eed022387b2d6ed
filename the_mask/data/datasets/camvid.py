"""CamVid, 11-class release: driving videos whose labelled frames are about one second apart.

``datasets/prepare_camvid.py`` sorts the release into one folder per sequence; with ``--frames`` it also decodes the
frames before each labelled one, as temporal models need them.
"""

from __future__ import annotations

from pathlib import Path

from the_mask.data.classes import load_class_list
from the_mask.data.video_tree import register_video_tree

FIX = "run datasets/prepare_camvid.py --source DIR (see datasets/README.md), or set DETECTRON2_DATASETS"
FRAMES_FIX = "run datasets/prepare_camvid.py --source DIR --frames VIDEOS (see datasets/README.md)"


def register_camvid(root: str | Path) -> None:
    """Register ``camvid_{train,val,test}`` at ``root``, and ``camvid_frames_...`` with memory frames beside it."""
    frames = Path(root).with_name("camvid_frames")
    classes = load_class_list("camvid")
    for split in ("train", "val", "test"):
        register_video_tree(f"camvid_{split}", root, split, classes, fix=FIX)
        register_video_tree(f"camvid_frames_{split}", frames, split, classes, require_labels=False, fix=FRAMES_FIX)
