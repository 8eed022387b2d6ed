"""Registry of mask decoders."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import nn

MASK_DECODERS = Registry("MASK_DECODERS")
MASK_DECODERS.__doc__ = """
Mask decoders, built as ``cls(cfg, in_channels)`` with the channels of the pixel decoder's maps, coarsest first.
``forward(maps, mask_features, num_frames, aux, last_frame_only)`` returns the predictions described in
:mod:`the_mask.modeling.mask.mask_decoders.base`.
"""


def build_mask_decoder(cfg: CfgNode, in_channels: Sequence[int]) -> nn.Module:
    """Build ``MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME`` for maps of these channels."""
    name = cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME
    if name not in MASK_DECODERS:
        known = ", ".join(sorted(key for key, _ in MASK_DECODERS))
        raise ValueError(f"MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME is {name!r}; registered are {known}")
    return MASK_DECODERS.get(name)(cfg, in_channels)
