"""Mask classification: queries predict masks and their classes (Mask2Former, THE-Mask)."""

from the_mask.modeling.mask.encoder_segmentor import EncoderSegmentor
from the_mask.modeling.mask.head import MaskClassificationHead
from the_mask.modeling.mask.mask_classifier import MaskClassifier
from the_mask.modeling.mask.mask_decoders import MASK_DECODERS, build_mask_decoder, stage1_to_stage2
from the_mask.modeling.mask.pixel_decoders import PIXEL_DECODERS, build_pixel_decoder

__all__ = [
    "MASK_DECODERS",
    "PIXEL_DECODERS",
    "EncoderSegmentor",
    "MaskClassificationHead",
    "MaskClassifier",
    "build_mask_decoder",
    "build_pixel_decoder",
    "stage1_to_stage2",
]
