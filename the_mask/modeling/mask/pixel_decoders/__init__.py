"""Pixel decoders: backbone maps to per-pixel mask features and the multi-scale maps the mask decoder reads."""

from the_mask.modeling.mask.pixel_decoders.ms_deform_attn import MSDeformAttnPixelDecoder
from the_mask.modeling.mask.pixel_decoders.registry import PIXEL_DECODERS, PixelDecoder, build_pixel_decoder

__all__ = ["PIXEL_DECODERS", "MSDeformAttnPixelDecoder", "PixelDecoder", "build_pixel_decoder"]
