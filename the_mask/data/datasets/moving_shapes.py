"""moving_shapes: the procedural video data set of :mod:`the_mask.data.synthetic`."""

from __future__ import annotations

import re
from pathlib import Path

from the_mask.data.classes import load_class_list
from the_mask.data.video_tree import register_video_tree

FIX = "run datasets/make_moving_shapes.py{option}, or set DETECTRON2_DATASETS to the folder that holds it"


def folder_name(version: int) -> str:
    """Folder, and beginning of the names, of a version of the set."""
    return "moving_shapes" if version == 2 else f"moving_shapes_v{version}"


def version_of(dataset: str) -> int:
    """Version of the set that a name such as ``moving_shapes_v3_val`` belongs to."""
    known = re.fullmatch(r"moving_shapes_v(\d+)_.*", dataset)
    return int(known[1]) if known else 2


def register_moving_shapes(root: str | Path, version: int = 2) -> None:
    """Register ``moving_shapes_{train,val}``, or of a later version ``moving_shapes_v3_{train,val}``, at ``root``."""
    name, fix = folder_name(version), FIX.format(option="" if version == 2 else f" --version {version}")
    for split in ("train", "val"):
        register_video_tree(f"{name}_{split}", root, split, load_class_list("moving_shapes"), fix=fix)
