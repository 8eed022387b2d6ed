"""moving_shapes: the procedural video data set of :mod:`the_mask.data.synthetic`."""

from __future__ import annotations

from pathlib import Path

from the_mask.data.classes import load_class_list
from the_mask.data.video_tree import register_video_tree

FIX = "run datasets/make_moving_shapes.py, or set DETECTRON2_DATASETS to the folder that holds it"


def register_moving_shapes(root: str | Path) -> None:
    """Register ``moving_shapes_{train,val}`` at ``root``."""
    for split in ("train", "val"):
        register_video_tree(f"moving_shapes_{split}", root, split, load_class_list("moving_shapes"), fix=FIX)
