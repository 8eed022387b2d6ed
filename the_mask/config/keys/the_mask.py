"""Keys of THE-Mask: matching rounds, hierarchical loss, two branches, two stages."""

from __future__ import annotations

from detectron2.config import CfgNode

from the_mask.config.allowed import one_of, within

INITIALISATIONS = ("identity", "xavier")


def add_keys(cfg: CfgNode) -> None:
    """Add them to ``cfg``, in place."""
    cfg.MODEL.THE_MASK = CfgNode()
    # Rounds of Hungarian matching: 1 is Mask2Former, 2 is THE-Mask.
    cfg.MODEL.THE_MASK.ROUNDS = within(1, least=1)
    # Cost of the rounds after the first: "full" or "bce" (the released one-frame matcher).
    cfg.MODEL.THE_MASK.SECOND_ROUND_COST = one_of("full", "bce")
    # L_s = CLASS*CE + PRIMARY_WEIGHT*(MASK*BCE + DICE*Dice)
    #     + SECONDARY_WEIGHT*(SECONDARY_MASK*BCE + SECONDARY_DICE*Dice)
    cfg.MODEL.THE_MASK.PRIMARY_WEIGHT = 1.0
    cfg.MODEL.THE_MASK.SECONDARY_WEIGHT = 0.5
    cfg.MODEL.THE_MASK.SECONDARY_MASK_WEIGHT = 0.5
    cfg.MODEL.THE_MASK.SECONDARY_DICE_WEIGHT = 0.5
    # Points per secondary mask; 0 takes every pixel of the ground truth, as released (exact, and no more memory).
    cfg.MODEL.THE_MASK.SECONDARY_NUM_POINTS = within(0, least=0)
    # Weight of the frame branch beside the clip branch (temporal decoder only).
    cfg.MODEL.THE_MASK.FRAME_WEIGHT = 0.25
    # Iterations of plain one-round training before the hierarchical loss, and what drives them: "iteration", or
    # "reference", the released code, which never leaves the warm-up when WARMUP_ITERS > 0.
    cfg.MODEL.THE_MASK.WARMUP_ITERS = within(0, least=0)
    cfg.MODEL.THE_MASK.WARMUP_MODE = one_of("iteration", "reference")
    # Final map = CLIP_SCORE_WEIGHT * clip branch + (1 - CLIP_SCORE_WEIGHT) * frame branch.
    cfg.MODEL.THE_MASK.CLIP_SCORE_WEIGHT = within(0.5, 0, 1)
    # Dropout of the temporal layer.
    cfg.MODEL.THE_MASK.TEMPORAL_DROPOUT = within(0.1, 0, 1)
    # Start of the temporal layer: "identity" (stage 2 starts where stage 1 ended) or "xavier" (released).
    cfg.MODEL.THE_MASK.TEMPORAL_INIT = one_of(*INITIALISATIONS)
    # Stage 2: start from a one-frame checkpoint in MODEL.WEIGHTS (heads and norm are copied to both branches).
    cfg.MODEL.THE_MASK.INIT_FROM_STAGE1 = False
    # Substrings of the parameter names that stay trainable; [] trains everything. Stage 2 uses ["predictor"].
    cfg.MODEL.THE_MASK.TRAINABLE = []
    # Keep modules without a trainable parameter in eval mode while training.
    cfg.MODEL.THE_MASK.FROZEN_EVAL = True
