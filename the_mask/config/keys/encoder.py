"""Keys of encoder-only mask classification (EoMT, VidEoMT, PMT): ``EncoderSegmentor``."""

from __future__ import annotations

from the_mask.config.options import Options, one_of

CLASS_LOGITS = ("causal-mean", "per-frame", "whole-video")


class EncoderOptions(Options, group="MODEL.ENCODER"):
    """The encoder's last blocks, which see the queries."""

    # How many they are: 3 of 12 (S, B), 4 of 24 (L).
    num_blocks: int = 3
    # Carry the queries from frame to frame (VidEoMT); False takes every frame for itself (EoMT).
    propagate: bool = False
    # Carry them on through the encoder's final norm: True for DINOv3, False for DINOv2.
    norm_queries: bool = False
    # Auxiliary predictions through the encoder's final norm; the released VidEoMT leaves it out for DINOv2.
    norm_auxiliary: bool = True
    # In training, queries attend only to the patches of their own mask, with a probability that falls from 1 to 0.
    masked_attention: bool = True
    # Shares of SOLVER.MAX_ITER between which it falls, one per block; [] spreads the blocks evenly.
    anneal_start: tuple[float, ...] = ()
    anneal_end: tuple[float, ...] = ()
    # Which class logits of a query count at a frame: "per-frame", its own; "causal-mean", the mean over the frames up
    # to it; or "whole-video", the mean over the whole clip, later frames too (as published; not for streams).
    class_logits: str = one_of(*CLASS_LOGITS, key="TEST.CLASS_LOGITS")


class FrozenDecoderOptions(Options, group="MODEL.ENCODER.FROZEN"):
    """A decoder of its own on the features of an encoder that does not train (PMT), in place of the encoder's last
    blocks."""

    enabled: bool = False
    # Blocks of a plain ViT whose outputs are combined; for other backbones, the levels in IN_FEATURES.
    levels: tuple[int, ...] = (5, 11, 17, 23)
    # Transformer blocks of this width (0: the encoder's), heads and hidden width.
    blocks: int = 6
    width: int = 0
    heads: int = 16
    hidden: int = 1024
    layer_scale: float = 1.0
