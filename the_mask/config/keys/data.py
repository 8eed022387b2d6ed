"""Keys of data sets that live outside the library, and of clips made from single images."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_keys(cfg: CfgNode) -> None:
    """Add them to ``cfg``, in place."""
    # Modules ("my_package.my_data") or files ("my_data.py", relative to the working directory) that register data sets
    # when they are imported. They are imported before a data set is looked up, in every process.
    cfg.DATASETS.IMPORT = []

    # Training clips from single images: an image of a data set of images becomes a clip in which an affine motion
    # carries it along. Without it, a clip of several frames repeats the image.
    cfg.INPUT.PSEUDO_CLIP = CfgNode()
    cfg.INPUT.PSEUDO_CLIP.ENABLED = False
    # Largest motion of the frame farthest from the reference; frames in between have moved in proportion.
    # Shift, as a share of the image's width and height.
    cfg.INPUT.PSEUDO_CLIP.MAX_SHIFT = 0.05
    # Rotation and shear, degrees.
    cfg.INPUT.PSEUDO_CLIP.MAX_ROTATION = 5.0
    cfg.INPUT.PSEUDO_CLIP.MAX_SHEAR = 3.0
    # Zoom: by a factor between 1/(1 + this) and 1 + this.
    cfg.INPUT.PSEUDO_CLIP.MAX_ZOOM = 0.1
