"""Keys of mask classification, named and valued as in the Detectron2 Mask2Former for semantic segmentation."""

from __future__ import annotations

from the_mask.config.options import Options, one_of, option, within

MATCHINGS = ("clip", "first-frame")
MERGE_PLACES = ("mask", "input")
POSITION_ENCODINGS = ("sine2d", "sine3d")
INITIALISATIONS = ("identity", "xavier")


class LossOptions(Options, group="MODEL.MASK_FORMER"):
    """Matching and losses."""

    no_object_weight: float = 0.1
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    train_num_points: int = within(12544, least=1)
    oversample_ratio: float = within(3.0, least=1)
    importance_sample_ratio: float = within(0.75, 0, 1)
    # Leave IGNORE_VALUE pixels out of mask costs and mask losses. False reproduces the released code, where they
    # count as background of every mask.
    valid_mask: bool = True
    # When a target of a clip gets its query: "clip", by the costs over all its frames; or "first-frame", in the first
    # frame that shows it, among queries that are still free (VidEoMT; for queries carried from frame to frame).
    matching: str = one_of(*MATCHINGS)


class MaskOptions(Options, group="MODEL.MASK_FORMER"):
    """From the predictions of queries to losses and score maps."""

    deep_supervision: bool = True
    # Inputs are padded at the bottom and right to a multiple of this when the mapper has not done so.
    size_divisibility: int = 32
    # Where queries' masks are merged into class scores: "mask" (at mask size, then the scores are enlarged; THE-Mask's
    # order) or "input" (masks are enlarged to the network input, then merged; the released Mask2Former's order).
    merge_at: str = one_of(*MERGE_PLACES)
    # Final map = CLIP_SCORE_WEIGHT * clip branch + (1 - CLIP_SCORE_WEIGHT) * frame branch.
    clip_score_weight: float = within(0.5, 0, 1, key="MODEL.THE_MASK.CLIP_SCORE_WEIGHT")


class MaskDecoderOptions(Options, group="MODEL.MASK_FORMER"):
    """The mask decoder."""

    # "MaskedAttentionDecoder" or "TemporalAggregationDecoder".
    transformer_decoder_name: str = "MaskedAttentionDecoder"
    nheads: int = 8
    # Of the pixel decoder, too.
    dropout: float = 0.0
    dim_feedforward: int = 2048
    # One more than the number of decoder layers: the initial queries are supervised too.
    dec_layers: int = within(10, 2, 1024)
    pre_norm: bool = False
    hidden_dim: int = 256
    num_object_queries: int = within(100, 1, 65536)
    enforce_input_proj: bool = False
    # Position encoding of the keys: "sine2d" (image Mask2Former) or "sine3d" (THE-Mask).
    position_encoding: str = one_of(*POSITION_ENCODINGS)
    # Dropout of the temporal layer.
    temporal_dropout: float = within(0.1, 0, 1, key="MODEL.THE_MASK.TEMPORAL_DROPOUT")
    # Start of the temporal layer: "identity" (stage 2 starts where stage 1 ended) or "xavier" (released).
    temporal_init: str = one_of(*INITIALISATIONS, key="MODEL.THE_MASK.TEMPORAL_INIT")


class HeadOptions(Options, group="MODEL.SEM_SEG_HEAD"):
    """All heads, those of per-pixel models too."""

    name: str = "MaskClassificationHead"
    num_classes: int = within(54, least=1)
    ignore_value: int = 255
    in_features: tuple[str, ...] = ("res2", "res3", "res4", "res5")
    convs_dim: int = 256
    norm: str = "GN"


class PixelDecoderOptions(HeadOptions):
    """The pixel decoder."""

    pixel_decoder_name: str = "MSDeformAttnPixelDecoder"
    mask_dim: int = 256
    common_stride: int = 4
    transformer_enc_layers: int = 6
    transformer_enc_nheads: int = 8
    transformer_enc_dim_feedforward: int = 1024
    deformable_transformer_encoder_in_features: tuple[str, ...] = ("res3", "res4", "res5")
    deformable_transformer_encoder_n_points: int = 4


class HierarchyOptions(Options, group="MODEL.THE_MASK"):
    """THE-Mask's rounds of matching, hierarchical loss and two branches."""

    # Rounds of Hungarian matching: 1 is Mask2Former, 2 is THE-Mask.
    rounds: int = within(1, least=1)
    # Cost of the rounds after the first: "full" or "bce" (the released one-frame matcher).
    second_round_cost: str = one_of("full", "bce")
    # L_s = CLASS*CE + PRIMARY_WEIGHT*(MASK*BCE + DICE*Dice)
    #     + SECONDARY_WEIGHT*(SECONDARY_MASK*BCE + SECONDARY_DICE*Dice)
    primary_weight: float = 1.0
    secondary_weight: float = 0.5
    secondary_mask_weight: float = 0.5
    secondary_dice_weight: float = 0.5
    # Weight of the class loss of later rounds' queries; 1 as published, 0 leaves them without a class.
    secondary_class_weight: float = within(1.0, least=0)
    # Points per secondary mask; 0 takes every pixel of the ground truth, as released (exact, and no more memory).
    secondary_num_points: int = within(0, least=0)
    # Weight of the frame branch's loss; the clip branch has weight 1 (temporal decoder only).
    frame_weight: float = 0.25
    # Iterations of plain one-round training before the hierarchical loss, and what drives them: "iteration", or
    # "reference", the released code, which never leaves the warm-up when WARMUP_ITERS > 0.
    warmup_iters: int = within(0, least=0)
    warmup_mode: str = one_of("iteration", "reference")


class StageOptions(Options, group="MODEL.THE_MASK"):
    """Training in stages; every model reads what stays trainable."""

    # Stage 2: start from a one-frame checkpoint in MODEL.WEIGHTS (heads and norm are copied to both branches).
    init_from_stage1: bool = False
    # Substrings of the parameter names that stay trainable; [] trains everything. Stage 2 uses ["predictor"].
    trainable: tuple[str, ...] = ()
    # Keep modules without a trainable parameter in eval mode while training.
    frozen_eval: bool = True


class BackboneOptions(Options, group="MODEL.BACKBONE"):
    """The backbone."""

    name: str = "build_resnet_backbone"
    # Training from scratch is the default; configs that start from ImageNet freeze the stem themselves.
    freeze_at: int = 0
    resnet_stride_in_1x1: bool = option(False, key="MODEL.RESNETS.STRIDE_IN_1X1")
    resnet_out_features: tuple[str, ...] = option(("res2", "res3", "res4", "res5"), key="MODEL.RESNETS.OUT_FEATURES")
