"""Keys of per-pixel segmentors: ClipSegmentor, its heads, and the context blocks they are composed of."""

from __future__ import annotations

from the_mask.config.keys.mask_former import HeadOptions
from the_mask.config.options import Options, one_of, option, within

PAD_POLICIES = ("repeat_first", "repeat_current", "mask", "drop")
FRAMES = ("same_frame", "previous_frame")


class ClipSegmentorOptions(Options, group="MODEL.CLIP_SEGMENTOR"):
    """META_ARCHITECTURE ClipSegmentor: backbone, then the head of SEM_SEG_HEAD.NAME ("FCNHead", "UperNetHead", ...)."""

    # Inputs are padded at the bottom and right to a multiple of this.
    size_divisibility: int = 32
    # Memory frames and the current one go through the backbone in one batch (faster; batch norm sees all of them).
    # False runs one pass per frame, as the released TMANet.
    fold_time: bool = True
    # Gradients also flow through the backbone passes of memory frames.
    memory_grad: bool = True
    # Memory slots from before the video's start: "repeat_first" frame, "repeat_current" frame, "mask" them out of the
    # attention, or "drop" (training refuses such clips, see INPUT.CLIP.BOUNDARY; testing repeats the first frame).
    pad: str = one_of(*PAD_POLICIES)
    # Weight of every auxiliary head, and its channels.
    aux_weight: float = 0.4
    aux_channels: int = 256
    # Weight of each class in the cross-entropies; [] weighs all alike.
    class_weights: tuple[float, ...] = ()
    # Backbone levels with an auxiliary FCN head while training, e.g. ["res4"].
    aux_heads: tuple[str, ...] = option((), key="MODEL.AUX_HEADS")


class HardPixelOptions(Options, group="MODEL.CLIP_SEGMENTOR.OHEM"):
    """Online hard example mining: which pixels count in the main loss."""

    enabled: bool = False
    # Those whose own class has less than THRESHOLD probability, but at least MIN_KEPT per frame.
    threshold: float = within(0.7, 0, 1)
    min_kept: int = within(100000, least=1)


class PixelHeadOptions(HeadOptions):
    """Heads of per-pixel models."""

    # Dropout before the classifier.
    dropout: float = within(0.1, 0, 1)
    # FCNHead: 3x3 convolutions before the classifier.
    num_convs: int = within(2, least=1)
    # UperNetHead: cells per side of its pyramid pooling.
    pool_sizes: tuple[int, ...] = (1, 2, 3, 6)


class ContextOptions(Options, group="MODEL.CONTEXT"):
    """ContextHead: context blocks composed by an expression, and priors. See docs/context.md."""

    # E.g. "afnb > (tma + channel)": > feeds, + adds, & concatenates. The first block's main level is the last of
    # SEM_SEG_HEAD.IN_FEATURES.
    expression: str = "ppm"
    # T, memory frames of blocks that do not set their own MEMORY_LENGTH.
    memory_length: int = 4
    # Where class priors come from: "none", "previous_prediction" (of the frame before), "stage1" (of the block's own
    # first classifier) or "stored_masks" (of INPUT.PRIOR_MASKS in training, TEST.STAGES.MASKS in tests).
    prior: str = "none"
    # Share of SOLVER.MAX_ITER during which the ground truth is used as the prior.
    prior_gt_warmup: float = within(0.1, 0, 1)
    # Pass on class probabilities (True) or labels (False, as in the paper) of the previous frame.
    prior_soft: bool = False
    # Whose stored mask is read: "same_frame" or "previous_frame".
    stored_frame: str = one_of(*FRAMES)


class Blocks(Options, group="MODEL.BLOCKS", new_allowed=True):
    """Options by block: the lower-case key is the block's name in expressions. Further instances are keys of their own
    with TYPE, e.g. TMA2: {TYPE: "tma", KEY_CHANNELS: 32}, and inherit the options of their type. CHANNELS is the width
    of the result everywhere."""


class EmbedOptions(Options, group="MODEL.BLOCKS.EMBED"):
    """3x3 convolution of levels."""

    # [] is the main level.
    levels: tuple[str, ...] = ()
    # Level that the others are resized to; "" is the finest of them.
    size_level: str = ""
    channels: int = 512


class PpmOptions(Options, group="MODEL.BLOCKS.PPM"):
    """Pyramid pooling."""

    # Cells per side.
    sizes: tuple[int, ...] = (1, 2, 3, 6)
    channels: int = 512


class UperOptions(PpmOptions, group="MODEL.BLOCKS.UPER"):
    """UPerNet's pyramid."""

    # Finest first; [] takes SEM_SEG_HEAD.IN_FEATURES.
    levels: tuple[str, ...] = ()


class NonlocalOptions(Options, group="MODEL.BLOCKS.NONLOCAL"):
    """Attention within a frame."""

    channels: int = 512


class TmaOptions(Options, group="MODEL.BLOCKS.TMA"):
    """TMANet's attention to a memory of frames."""

    # Width of queries and keys.
    key_channels: int = 64
    value_channels: int = 256
    channels: int = 512
    # 0 takes MODEL.CONTEXT's.
    memory_length: int = 0
    # The current frame is the newest slot.
    include_current: bool = False
    # All slots have one set of encoders.
    share_slots: bool = False
    # Divide the logits by the root of KEY_CHANNELS (TMANet does not).
    scale: bool = False


class ApnbOptions(TmaOptions, group="MODEL.BLOCKS.APNB"):
    """The same, to anchors of the memory."""

    # "cube" (SIZES^3, as published), "clipped" (min(SIZES, T) x SIZES^2), "plane" (T x SIZES^2); or "spatial", those of
    # the current frame (the original block; DROPOUT is its own).
    pool: str = "cube"
    sizes: tuple[int, ...] = (1, 3, 6, 8)
    dropout: float = 0.05


class AfnbOptions(Options, group="MODEL.BLOCKS.AFNB"):
    """The main level attends to anchors of another."""

    level: str = "res4"
    sizes: tuple[int, ...] = (1, 3, 6, 8)
    key_channels: int = 64
    dropout: float = 0.05
    # Memory frames pass through it, too.
    apply_to_memory: bool = False


class CrissCrossOptions(Options, group="MODEL.BLOCKS.CC"):
    """Criss-cross attention."""

    # "cc2d", "cc3d_full", "cc_separable" or "cc_query".
    mode: str = "cc2d"
    # Recurrences.
    r: int = 2
    channels: int = 512
    memory_length: int = 0


class ChannelOptions(Options, group="MODEL.BLOCKS.CHANNEL"):
    """Attention between channels."""

    channels: int = 512
    # An auxiliary classifier and loss for the branch, as in DANet.
    classifier: bool = False
