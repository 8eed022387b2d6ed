"""Keys of clips, augmentation and test sizes."""

from __future__ import annotations

from detectron2.config import CfgNode

from the_mask.config.allowed import one_of, within

BOUNDARIES = ("clamp", "repeat_current", "drop")
ITEM_KINDS = ("video", "frame")
COLOR_MODES = ("per_frame", "shared", "none")


def add_keys(cfg: CfgNode) -> None:
    """Add them to ``cfg``, in place."""
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    # "auto" is resolved to "cuda" or "cpu" by load_config.
    cfg.MODEL.DEVICE = "auto"

    cfg.INPUT.CLIP = CfgNode()
    # Offsets of the other frames of a training clip from its reference frame; the reference is appended unless
    # 0 is in the list. [0] is a clip of one frame, [-3] is (r-3, r).
    cfg.INPUT.CLIP.DILATIONS = [0]
    # Probability that a training clip is read backwards in time.
    cfg.INPUT.CLIP.REVERSE_PROB = within(0.5, 0, 1)
    # What an offset outside the video becomes: "clamp" (nearest frame), "repeat_current" (the reference frame),
    # or "drop" (only references whose whole clip exists are sampled; a video too short for it is an error).
    cfg.INPUT.CLIP.BOUNDARY = one_of(*BOUNDARIES)
    # What one item of an epoch is: a "video" (a random clip of it) or a labelled "frame".
    cfg.INPUT.CLIP.ITEM = one_of(*ITEM_KINDS)

    cfg.INPUT.RESIZE = CfgNode()
    # Training frames are scaled, ratio kept, to fit this box (long edge, short edge; pixels) times u~U[MIN, MAX].
    cfg.INPUT.RESIZE.LONG_EDGE = 853
    cfg.INPUT.RESIZE.SHORT_EDGE = 480
    cfg.INPUT.RESIZE.MIN_SCALE = 0.5
    cfg.INPUT.RESIZE.MAX_SCALE = 2.0

    cfg.INPUT.CROP.ENABLED = True
    # Crops are always absolute pixels, (height, width); smaller frames are padded at the bottom and right.
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SIZE = [480, 480]
    # A crop is redrawn (10 draws at most, the last taken unchecked) while one class covers more than this share of its
    # labelled pixels.
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = within(0.75, 0, 1)
    # Photometric distortion of training frames: "per_frame", "shared" by the clip, or "none".
    cfg.INPUT.COLOR_JITTER = one_of(*COLOR_MODES)
    # Folder of masks predicted before (as TEST.SAVE_PREDICTIONS writes them), read into training clips for
    # MODEL.CONTEXT.PRIOR "stored_masks"; "" reads none.
    cfg.INPUT.PRIOR_MASKS = ""

    cfg.INPUT.TEST = CfgNode()
    # Test frames are scaled, ratio kept, to fit this box (pixels); 0 keeps the native size.
    cfg.INPUT.TEST.LONG_EDGE = 853
    cfg.INPUT.TEST.SHORT_EDGE = 480
    # Both sides are then stretched up to a multiple of this.
    cfg.INPUT.TEST.SIZE_MULTIPLE = within(32, least=1)
