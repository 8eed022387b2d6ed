"""VSPW: 124 classes, 3536 videos at 15 fps, in its native tree (480p release).

Frames are enumerated, not numbered: the release lacks some. Values 253..255 and 0 ("others") of a mask are ignored.
"""

from __future__ import annotations

from pathlib import Path

from the_mask.data.classes import load_class_list
from the_mask.data.video_tree import register_video_tree

FIX = (
    "download VSPW_480p from https://github.com/VSPW-dataset/VSPW-dataset-download and unpack it there "
    "(see datasets/README.md), or set DETECTRON2_DATASETS to the folder that holds it"
)


def register_vspw(root: str | Path) -> None:
    """Register ``vspw_{train,val,test}`` at ``root`` (the folder VSPW_480p); masks of the test split are withheld."""
    for split in ("train", "val", "test"):
        register_video_tree(
            f"vspw_{split}", root, split, load_class_list("vspw"), require_labels=split != "test", fix=FIX
        )
