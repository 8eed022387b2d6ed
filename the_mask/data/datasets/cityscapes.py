"""Cityscapes: 2,975 and 500 finely labelled images of 19 classes, as images and as the snippets around them.

A snippet has 30 frames (1.8 s), of which the 20th is labelled. The masks are ``*_gtFine_labelTrainIds.png``, which
``datasets/prepare_cityscapes.py`` makes from the ``*_gtFine_labelIds.png`` of the release.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from the_mask.data.classes import load_class_list
from the_mask.data.image_tree import ImageTree, SnippetTree
from the_mask.data.registry import register_tree

FIX = (
    "unpack the release there and run datasets/prepare_cityscapes.py (see datasets/README.md), or set "
    "DETECTRON2_DATASETS to the folder that holds cityscapes"
)
IMAGE_SUFFIX = "_leftImg8bit.png"
LABEL_SUFFIX = "_gtFine_labelTrainIds.png"
# Frames of a snippet around its labelled one.
BEFORE, AFTER = 19, 10


def explain_values(values: Collection[int], masks: int) -> str:
    """Recognise label ids (0..33) by the values of some masks; returns "" for train ids (0..18, 255)."""
    strange = sorted(value for value in values if 18 < value < 34)
    if not strange:
        return ""
    return (
        f"Values {strange} look like label ids (*_labelIds.png); datasets/prepare_cityscapes.py makes train ids of them"
    )


def register_cityscapes(root: str | Path, before: int = BEFORE, after: int = AFTER) -> None:
    """Register ``cityscapes_{train,val}`` (images) and ``cityscapes_sequence_{train,val}`` (snippets) at ``root``.

    Args:
        root: folder with ``leftImg8bit``, ``leftImg8bit_sequence`` and ``gtFine``.
        before: frames of a snippet that are kept before the labelled one.
        after: the same after it, for the training split. The validation split has none, since they are not scored.
    """
    root = Path(root)
    classes = load_class_list("cityscapes19", explain_values)
    for split in ("train", "val"):
        labels = root / "gtFine" / split
        images = ImageTree(
            f"cityscapes_{split}",
            root,
            split,
            classes,
            fix=FIX,
            image_dir=root / "leftImg8bit" / split,
            label_dir=labels,
            image_suffix=IMAGE_SUFFIX,
            label_suffix=LABEL_SUFFIX,
        )
        snippets = SnippetTree(
            f"cityscapes_sequence_{split}",
            root,
            split,
            classes,
            fix=FIX,
            image_dir=root / "leftImg8bit_sequence" / split,
            label_dir=labels,
            image_suffix=IMAGE_SUFFIX,
            label_suffix=LABEL_SUFFIX,
            before=before,
            after=after if split == "train" else 0,
        )
        register_tree(images)
        register_tree(snippets)
