"""Keys of clips, augmentation and test sizes."""

from __future__ import annotations

from the_mask.config.options import Options, one_of, within

BOUNDARIES = ("clamp", "repeat_current", "drop")
ITEM_KINDS = ("video", "frame")
COLOR_MODES = ("per_frame", "shared", "none")


class InputOptions(Options, group="INPUT"):
    """Frames of training clips."""

    format: str = "RGB"
    # Photometric distortion of training frames: "per_frame", "shared" by the clip, or "none".
    color_jitter: str = one_of(*COLOR_MODES)
    # Folder of masks predicted before (as TEST.SAVE_PREDICTIONS writes them), read into training clips for
    # MODEL.CONTEXT.PRIOR "stored_masks"; "" reads none.
    prior_masks: str = ""


class ClipOptions(Options, group="INPUT.CLIP"):
    """Training clips."""

    # Offsets of the other frames of a training clip from its reference frame; the reference is appended unless
    # 0 is in the list. [0] is a clip of one frame, [-3] is (r-3, r).
    dilations: tuple[int, ...] = (0,)
    # Probability that a training clip is read backwards in time.
    reverse_prob: float = within(0.5, 0, 1)
    # What an offset outside the video becomes: "clamp" (nearest frame), "repeat_current" (the reference frame),
    # or "drop" (only references whose whole clip exists are sampled; a video too short for it is an error).
    boundary: str = one_of(*BOUNDARIES)
    # What one item of an epoch is: a "video" (a random clip of it) or a labelled "frame".
    item: str = one_of(*ITEM_KINDS)


class ResizeOptions(Options, group="INPUT.RESIZE"):
    """Scaling of training frames."""

    # They are scaled, ratio kept, to fit this box (long edge, short edge; pixels) times u~U[MIN, MAX].
    long_edge: int = 853
    short_edge: int = 480
    min_scale: float = 0.5
    max_scale: float = 2.0


class CropOptions(Options, group="INPUT.CROP"):
    """Crops of training frames."""

    enabled: bool = True
    # Crops are always absolute pixels, (height, width); smaller frames are padded at the bottom and right.
    type: str = "absolute"
    size: tuple[int, ...] = (480, 480)
    # A crop is redrawn (10 draws at most, the last taken unchecked) while one class covers more than this share of its
    # labelled pixels.
    single_category_max_area: float = within(0.75, 0, 1)


class TestSizeOptions(Options, group="INPUT.TEST"):
    """Scaling of test frames."""

    # They are scaled, ratio kept, to fit this box (pixels); 0 keeps the native size.
    long_edge: int = 853
    short_edge: int = 480
    # Both sides are then stretched up to a multiple of this.
    size_multiple: int = within(32, least=1)
