"""COCO-Stuff 164k: 171 classes (80 things, 91 stuff), 118,287 and 5,000 images with native PNG masks.

A mask stores COCO category id - 1, which runs from 0 to 181 with eleven numbers unused; a table closes the gaps when
the mask is read. Nothing else is shifted: 0 is "person" and stays a class. (The configuration of the PVUW 2023
third-place entry asks for ``reduce_zero_label`` on such masks, which ignores "person", gives every other class the
name of its neighbour, and never uses the last one. That option belongs to the older 10k release, where 0 is void.)
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from the_mask.data.classes import load_class_list
from the_mask.data.image_tree import ImageTree
from the_mask.data.registry import PROBES, register_tree

FIX = (
    "unpack train2017.zip and val2017.zip into images/ and stuffthingmaps_trainval2017.zip into annotations/ "
    "(see datasets/README.md), or set DETECTRON2_DATASETS to the folder that holds coco_stuff164k"
)
# Values that do not occur in native masks: categories that COCO numbered but never annotated.
UNUSED_VALUES = frozenset({11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90})
LARGEST_10K = 171
NEEDED = "coco_stuff164k needs the native PNGs of stuffthingmaps_trainval2017.zip (0..181, 255 unlabelled)"


def explain_values(values: Collection[int], masks: int) -> str:
    """Recognise masks of COCO-Stuff 10k (0 void, 1..171) and converted ones (0..170); native ones have 0..181.

    Args:
        values: values that occur in some masks.
        masks: number of masks that were read.

    Returns:
        What the masks seem to be, or "" when they may be native.
    """
    labels = set(values) - {255}
    unused = sorted(labels & UNUSED_VALUES)
    if not labels or max(labels) > LARGEST_10K:
        return ""
    if not unused:
        # Native masks of a handful of images nearly always hold 255 or one of the ten classes above 171.
        if masks < PROBES or 255 in values:
            return ""
        shown = f"{masks} masks hold nothing above {max(labels)}, and no 255"
    else:
        shown = f"values {unused} do not occur in native masks, and nothing is above {max(labels)}"
    if 255 in values and LARGEST_10K not in labels:
        return f"These look like masks converted to train ids (*_labelTrainIds.png, 0..170): {shown}. {NEEDED}"
    return (
        f"These look like labels of COCO-Stuff 10k (1..171, 0 unlabelled), whose numbers mean other classes: {shown}. "
        f"{NEEDED}"
    )


def register_coco_stuff(root: str | Path) -> None:
    """Register ``coco_stuff164k_{train,val}`` at ``root``."""
    root = Path(root)
    classes = load_class_list("coco_stuff164k", explain_values)
    for split in ("train", "val"):
        folder = f"{split}2017"
        tree = ImageTree(
            f"coco_stuff164k_{split}",
            root,
            split,
            classes,
            fix=FIX,
            image_dir=root / "images" / folder,
            label_dir=root / "annotations" / folder,
            image_suffix=".jpg",
            other_suffixes=("_labelTrainIds.png", "_instanceTrainIds.png"),
        )
        register_tree(tree)
