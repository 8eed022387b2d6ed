"""Registry of pixel decoders."""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from fvcore.common.registry import Registry
from torch import nn

PIXEL_DECODERS = Registry("PIXEL_DECODERS")
PIXEL_DECODERS.__doc__ = "Subclasses of PixelDecoder, built as cls(cfg, input_shape)."


class PixelDecoder(nn.Module):
    """Base class of pixel decoders.

    ``forward(features)`` takes the backbone's maps by name and returns ``(mask_features, maps)``: mask_features
    [N, MASK_DIM, h, w], and maps [N, C_l, h_l, w_l] for the mask decoder, coarsest first.

    Attributes:
        out_channels, out_strides: of the maps, coarsest first.
        mask_stride: input pixels per cell of mask_features.
    """

    out_channels: list[int]
    out_strides: list[int]
    mask_stride: int


def build_pixel_decoder(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> PixelDecoder:
    """Build ``MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME`` for a backbone of this output shape."""
    name = cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME
    if name not in PIXEL_DECODERS:
        known = ", ".join(sorted(key for key, _ in PIXEL_DECODERS))
        raise ValueError(f"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME is {name!r}; registered are {known}")
    return PIXEL_DECODERS.get(name)(cfg, input_shape)
