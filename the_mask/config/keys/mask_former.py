"""Keys of mask classification, named and valued as in the Detectron2 Mask2Former for semantic segmentation."""

from __future__ import annotations

from detectron2.config import CfgNode

from the_mask.config.allowed import one_of, within

MATCHINGS = ("clip", "first-frame")
MERGE_PLACES = ("mask", "input")


def add_keys(cfg: CfgNode) -> None:
    """Add them to ``cfg``, in place."""
    # Names and values are those of the Detectron2 Mask2Former for semantic segmentation.
    cfg.MODEL.META_ARCHITECTURE = "MaskClassifier"
    cfg.MODEL.MASK_FORMER = CfgNode()
    cfg.MODEL.MASK_FORMER.DEEP_SUPERVISION = True
    cfg.MODEL.MASK_FORMER.NO_OBJECT_WEIGHT = 0.1
    cfg.MODEL.MASK_FORMER.CLASS_WEIGHT = 2.0
    cfg.MODEL.MASK_FORMER.MASK_WEIGHT = 5.0
    cfg.MODEL.MASK_FORMER.DICE_WEIGHT = 5.0
    cfg.MODEL.MASK_FORMER.NHEADS = 8
    cfg.MODEL.MASK_FORMER.DROPOUT = 0.0
    cfg.MODEL.MASK_FORMER.DIM_FEEDFORWARD = 2048
    # One more than the number of decoder layers: the initial queries are supervised too.
    cfg.MODEL.MASK_FORMER.DEC_LAYERS = within(10, 2, 1024)
    cfg.MODEL.MASK_FORMER.PRE_NORM = False
    cfg.MODEL.MASK_FORMER.HIDDEN_DIM = 256
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = within(100, 1, 65536)
    cfg.MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ = False
    # Inputs are padded at the bottom and right to a multiple of this when the mapper has not done so.
    cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY = 32
    # "MaskedAttentionDecoder" or "TemporalAggregationDecoder".
    cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME = "MaskedAttentionDecoder"
    cfg.MODEL.MASK_FORMER.TRAIN_NUM_POINTS = within(12544, least=1)
    cfg.MODEL.MASK_FORMER.OVERSAMPLE_RATIO = within(3.0, least=1)
    cfg.MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO = within(0.75, 0, 1)
    # Leave IGNORE_VALUE pixels out of mask costs and mask losses. False reproduces the released code, where they
    # count as background of every mask.
    cfg.MODEL.MASK_FORMER.VALID_MASK = True
    # Where queries' masks are merged into class scores: "mask" (at mask size, then the scores are enlarged; THE-Mask's
    # order) or "input" (masks are enlarged to the network input, then merged; the released Mask2Former's order).
    cfg.MODEL.MASK_FORMER.MERGE_AT = one_of(*MERGE_PLACES)
    # When a target of a clip gets its query: "clip", by the costs over all its frames; or "first-frame", in the first
    # frame that shows it, among queries that are still free (VidEoMT; for queries carried from frame to frame).
    cfg.MODEL.MASK_FORMER.MATCHING = one_of(*MATCHINGS)
    # Position encoding of the mask decoder's keys: "sine2d" (image Mask2Former) or "sine3d" (THE-Mask).
    cfg.MODEL.MASK_FORMER.POSITION_ENCODING = one_of("sine2d", "sine3d")

    cfg.MODEL.SEM_SEG_HEAD.NAME = "MaskClassificationHead"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = within(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, least=1)
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 255
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 256
    cfg.MODEL.SEM_SEG_HEAD.MASK_DIM = 256
    cfg.MODEL.SEM_SEG_HEAD.NORM = "GN"
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "MSDeformAttnPixelDecoder"
    cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS = 6
    cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_NHEADS = 8
    cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD = 1024
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 4

    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    # Training from scratch is the default; configs that start from ImageNet freeze the stem themselves.
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
