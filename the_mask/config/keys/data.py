"""Keys of data sets that live outside the library, and of clips made from single images."""

from __future__ import annotations

from the_mask.config.options import Options, option


class DatasetOptions(Options, group="DATASETS"):
    """Where data sets come from."""

    # Modules ("my_package.my_data") or files ("my_data.py", relative to the working directory) that register data sets
    # when they are imported. They are imported before a data set is looked up, in every process.
    modules: tuple[str, ...] = option((), key="DATASETS.IMPORT")


class PseudoClipOptions(Options, group="INPUT.PSEUDO_CLIP"):
    """Training clips from single images: an image of a data set of images becomes a clip in which an affine motion
    carries it along. Without it, a clip of several frames repeats the image."""

    enabled: bool = False
    # Largest motion of the frame farthest from the reference; frames in between have moved in proportion.
    # Shift, as a share of the image's width and height.
    max_shift: float = 0.05
    # Rotation and shear, degrees.
    max_rotation: float = 5.0
    max_shear: float = 3.0
    # Zoom: by a factor between 1/(1 + this) and 1 + this.
    max_zoom: float = 0.1
