"""ADE20K, SceneParse150: 20,210 and 2,000 images of 150 classes; 0 ("other") is ignored."""

from __future__ import annotations

from pathlib import Path

from the_mask.data.classes import load_class_list
from the_mask.data.image_tree import ImageTree
from the_mask.data.registry import register_tree

FIX = (
    "download ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu and unpack it there (see "
    "datasets/README.md), or set DETECTRON2_DATASETS to the folder that holds it"
)


def register_ade20k(root: str | Path) -> None:
    """Register ``ade20k150_{train,val}`` at ``root`` (the folder ADEChallengeData2016)."""
    root = Path(root)
    for split, folder in (("train", "training"), ("val", "validation")):
        tree = ImageTree(
            f"ade20k150_{split}",
            root,
            split,
            load_class_list("ade20k150"),
            fix=FIX,
            image_dir=root / "images" / folder,
            label_dir=root / "annotations" / folder,
            image_suffix=".jpg",
        )
        register_tree(tree)
