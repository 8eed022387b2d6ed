"""Keys of per-pixel segmentors: ClipSegmentor, its heads, and the context blocks they are composed of."""

from __future__ import annotations

from detectron2.config import CfgNode


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
    cfg.MODEL.CLIP_SEGMENTOR.PAD = "repeat_first"
    # Weight of every auxiliary head, and its channels.
    cfg.MODEL.CLIP_SEGMENTOR.AUX_WEIGHT = 0.4
    cfg.MODEL.CLIP_SEGMENTOR.AUX_CHANNELS = 256
    # Online hard example mining: only pixels whose own class has less than THRESHOLD probability count in the main
    # loss, but at least MIN_KEPT per frame.
    cfg.MODEL.CLIP_SEGMENTOR.OHEM = CfgNode()
    cfg.MODEL.CLIP_SEGMENTOR.OHEM.ENABLED = False
    cfg.MODEL.CLIP_SEGMENTOR.OHEM.THRESHOLD = 0.7
    cfg.MODEL.CLIP_SEGMENTOR.OHEM.MIN_KEPT = 100000

    # Backbone levels with an FCN head of their own while training, e.g. ["res4"].
    cfg.MODEL.AUX_HEADS = []

    # Dropout before the classifiers of per-pixel heads.
    cfg.MODEL.SEM_SEG_HEAD.DROPOUT = 0.1
    # FCNHead: 3x3 convolutions before the classifier.
    cfg.MODEL.SEM_SEG_HEAD.NUM_CONVS = 2

    cfg.MODEL.CONTEXT = CfgNode()
    # Where class priors come from: "none", or one of the_mask.modeling.context.prior_providers.PRIOR_PROVIDERS.
    cfg.MODEL.CONTEXT.PRIOR = "none"
