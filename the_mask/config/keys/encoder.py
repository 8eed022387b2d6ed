"""Keys of encoder-only mask classification (EoMT, VidEoMT, PMT): ``EncoderSegmentor``."""

from __future__ import annotations

from detectron2.config import CfgNode

from the_mask.config.allowed import one_of

CLASS_LOGITS = ("causal-mean", "per-frame", "whole-video")


def add_keys(cfg: CfgNode) -> None:
    """Add them to ``cfg``, in place."""
    cfg.MODEL.ENCODER = CfgNode()
    # The last blocks of the encoder, which see the queries: 3 of 12 (S, B), 4 of 24 (L).
    cfg.MODEL.ENCODER.NUM_BLOCKS = 3
    # Carry the queries from frame to frame (VidEoMT); False takes every frame for itself (EoMT).
    cfg.MODEL.ENCODER.PROPAGATE = False
    # Carry them on through the encoder's final norm: True for DINOv3, False for DINOv2.
    cfg.MODEL.ENCODER.NORM_QUERIES = False
    # Auxiliary predictions through the encoder's final norm; the released VidEoMT leaves it out for DINOv2.
    cfg.MODEL.ENCODER.NORM_AUXILIARY = True
    # Queries look only at the patches of their own mask in training, with a probability that falls from 1 to 0.
    cfg.MODEL.ENCODER.MASKED_ATTENTION = True
    # Shares of SOLVER.MAX_ITER between which it falls, one per block; [] spreads the blocks evenly.
    cfg.MODEL.ENCODER.ANNEAL_START = []
    cfg.MODEL.ENCODER.ANNEAL_END = []
    cfg.MODEL.ENCODER.ANNEAL_POWER = 0.9

    # A decoder of its own on the features of an encoder that does not train (PMT), in place of the encoder's last
    # blocks: transformer blocks of this width (0: the encoder's), heads and hidden width.
    cfg.MODEL.ENCODER.FROZEN = CfgNode()
    cfg.MODEL.ENCODER.FROZEN.ENABLED = False
    # Blocks of a plain ViT whose outputs are joined; of another backbone, its IN_FEATURES are.
    cfg.MODEL.ENCODER.FROZEN.LEVELS = [5, 11, 17, 23]
    cfg.MODEL.ENCODER.FROZEN.BLOCKS = 6
    cfg.MODEL.ENCODER.FROZEN.WIDTH = 0
    cfg.MODEL.ENCODER.FROZEN.HEADS = 16
    cfg.MODEL.ENCODER.FROZEN.HIDDEN = 1024
    cfg.MODEL.ENCODER.FROZEN.LAYER_SCALE = 1.0
    cfg.MODEL.ENCODER.FROZEN.ROPE_BASE = 100.0

    # Folder in which training keeps the features of a frozen backbone, of any model; "" computes them every time.
    cfg.MODEL.FROZEN_FEATURES = CfgNode()
    cfg.MODEL.FROZEN_FEATURES.CACHE = ""
    # Most that the folder of one backbone may take, GiB.
    cfg.MODEL.FROZEN_FEATURES.MAX_GB = 20.0

    # Which class logits of a query count at a frame: "per-frame", its own; "causal-mean", the mean over the frames up
    # to it; or "whole-video", the mean over the whole clip, later frames too (as published; not for streams).
    cfg.TEST.CLASS_LOGITS = one_of(*CLASS_LOGITS)
