"""CamVid, 11-class release: driving videos whose labelled frames are about one second apart.

``datasets/prepare_camvid.py`` sorts the release into one folder per sequence.
"""

from __future__ import annotations

from pathlib import Path

from the_mask.data.classes import load_class_list
from the_mask.data.video_tree import register_video_tree

FIX = "run datasets/prepare_camvid.py --source DIR (see datasets/README.md), or set DETECTRON2_DATASETS"


def register_camvid(root: str | Path) -> None:
    """Register ``camvid_{train,val,test}`` at ``root``."""
    for split in ("train", "val", "test"):
        register_video_tree(f"camvid_{split}", root, split, load_class_list("camvid"), fix=FIX)
