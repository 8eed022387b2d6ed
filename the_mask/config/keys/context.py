"""Keys of per-pixel segmentors: ClipSegmentor, its heads, and the context blocks they are composed of."""

from __future__ import annotations

from detectron2.config import CfgNode

from the_mask.config.allowed import one_of, within

PAD_POLICIES = ("repeat_first", "repeat_current", "mask", "drop")


def add_keys(cfg: CfgNode) -> None:
    """Add them to ``cfg``, in place."""
    # META_ARCHITECTURE ClipSegmentor: backbone, then the SEM_SEG_HEAD.NAME of "FCNHead", "UperNetHead", "ContextHead".
    cfg.MODEL.CLIP_SEGMENTOR = CfgNode()
    # Inputs are padded at the bottom and right to a multiple of this.
    cfg.MODEL.CLIP_SEGMENTOR.SIZE_DIVISIBILITY = 32
    # Memory frames and the current one go through the backbone in one batch (faster; batch norm sees all of them).
    # False runs one pass per frame, as the released TMANet.
    cfg.MODEL.CLIP_SEGMENTOR.FOLD_TIME = True
    # Gradients also flow through the backbone passes of memory frames.
    cfg.MODEL.CLIP_SEGMENTOR.MEMORY_GRAD = True
    # Memory slots from before the video's start: "repeat_first" frame, "repeat_current" frame, "mask" them out of the
    # attention, or "drop" (training refuses such clips, see INPUT.CLIP.BOUNDARY; testing repeats the first frame).
    cfg.MODEL.CLIP_SEGMENTOR.PAD = one_of(*PAD_POLICIES)
    # Weight of every auxiliary head, and its channels.
    cfg.MODEL.CLIP_SEGMENTOR.AUX_WEIGHT = 0.4
    cfg.MODEL.CLIP_SEGMENTOR.AUX_CHANNELS = 256
    # Online hard example mining: only pixels whose own class has less than THRESHOLD probability count in the main
    # loss, but at least MIN_KEPT per frame.
    cfg.MODEL.CLIP_SEGMENTOR.OHEM = CfgNode()
    cfg.MODEL.CLIP_SEGMENTOR.OHEM.ENABLED = False
    cfg.MODEL.CLIP_SEGMENTOR.OHEM.THRESHOLD = within(0.7, 0, 1)
    cfg.MODEL.CLIP_SEGMENTOR.OHEM.MIN_KEPT = within(100000, least=1)
    # Weight of each class in the cross-entropies; [] weighs all alike.
    cfg.MODEL.CLIP_SEGMENTOR.CLASS_WEIGHTS = []

    # Backbone levels with an FCN head of their own while training, e.g. ["res4"].
    cfg.MODEL.AUX_HEADS = []

    # Dropout before the classifiers of per-pixel heads.
    cfg.MODEL.SEM_SEG_HEAD.DROPOUT = within(0.1, 0, 1)
    # FCNHead: 3x3 convolutions before the classifier.
    cfg.MODEL.SEM_SEG_HEAD.NUM_CONVS = 2
    # UperNetHead: cells per side of its pyramid pooling.
    cfg.MODEL.SEM_SEG_HEAD.POOL_SIZES = [1, 2, 3, 6]

    # ContextHead: an expression of context blocks, e.g. "afnb > (tma + channel)": > feeds, + adds, & concatenates. The
    # first block's main level is the last of SEM_SEG_HEAD.IN_FEATURES. See docs/context.md.
    cfg.MODEL.CONTEXT = CfgNode()
    cfg.MODEL.CONTEXT.EXPRESSION = "ppm"
    # T, memory frames of every block with a memory that has no MEMORY_LENGTH of its own.
    cfg.MODEL.CONTEXT.MEMORY_LENGTH = 4
    # Where class priors come from: "none", or one of the_mask.modeling.pixel.context.prior_providers.PRIOR_PROVIDERS.
    cfg.MODEL.CONTEXT.PRIOR = "none"

    # Options by block: the lower-case key is the block's name in expressions. Further instances are keys of their own
    # with TYPE, e.g. TMA2: {TYPE: "tma", KEY_CHANNELS: 32}, and inherit the options of their type.
    cfg.MODEL.BLOCKS = CfgNode(new_allowed=True)
    blocks = cfg.MODEL.BLOCKS
    # 3x3 convolution of levels ([]: the main one), resized to SIZE_LEVEL ("": the finest of them).
    blocks.EMBED = CfgNode({"LEVELS": [], "SIZE_LEVEL": "", "CHANNELS": 512})
    # CHANNELS is the width of the result everywhere.
    blocks.PPM = CfgNode({"SIZES": [1, 2, 3, 6], "CHANNELS": 512})
    # LEVELS, finest first; [] takes SEM_SEG_HEAD.IN_FEATURES.
    blocks.UPER = CfgNode({"LEVELS": [], "SIZES": [1, 2, 3, 6], "CHANNELS": 512})
    blocks.NONLOCAL = CfgNode({"CHANNELS": 512})
    # KEY_CHANNELS is the width of queries and keys. MEMORY_LENGTH 0 takes MODEL.CONTEXT's. INCLUDE_CURRENT makes the
    # current frame the newest slot, SHARE_SLOTS gives all slots one set of encoders, SCALE divides the logits by the
    # root of KEY_CHANNELS (TMANet does not).
    temporal = {
        "KEY_CHANNELS": 64,
        "VALUE_CHANNELS": 256,
        "CHANNELS": 512,
        "MEMORY_LENGTH": 0,
        "INCLUDE_CURRENT": False,
        "SHARE_SLOTS": False,
        "SCALE": False,
    }
    blocks.TMA = CfgNode(dict(temporal))
    # POOL: anchors of the memory, "cube" (SIZES^3, as published), "clipped" (min(SIZES, T) x SIZES^2), "plane"
    # (T x SIZES^2); or "spatial", those of the current frame (the original block; DROPOUT is its own).
    blocks.APNB = CfgNode({**temporal, "POOL": "cube", "SIZES": [1, 3, 6, 8], "DROPOUT": 0.05})
    # The main level attends to anchors of LEVEL. Memory frames pass through it with APPLY_TO_MEMORY.
    blocks.AFNB = CfgNode(
        {"LEVEL": "res4", "SIZES": [1, 3, 6, 8], "KEY_CHANNELS": 64, "DROPOUT": 0.05, "APPLY_TO_MEMORY": False}
    )
    # MODE: "cc2d", "cc3d_full", "cc_separable" or "cc_query"; R recurrences.
    blocks.CC = CfgNode({"MODE": "cc2d", "R": 2, "CHANNELS": 512, "MEMORY_LENGTH": 0})
    # CLASSIFIER gives the branch a loss of its own, as in DANet.
    blocks.CHANNEL = CfgNode({"CHANNELS": 512, "CLASSIFIER": False})
