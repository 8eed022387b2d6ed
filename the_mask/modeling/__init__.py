"""Models. Importing this package fills the registries: backbones, pixel decoders, mask decoders, segmentors."""

from detectron2.modeling import build_model

from the_mask.modeling import backbones as backbones
from the_mask.modeling import heads as heads
from the_mask.modeling import keyframe as keyframe
from the_mask.modeling.mask_decoders import MASK_DECODERS, build_mask_decoder, stage1_to_stage2
from the_mask.modeling.pixel_decoders import PIXEL_DECODERS, build_pixel_decoder
from the_mask.modeling.segmentors import ClipSegmentor, MaskClassificationHead, MaskClassifier, Segmentor

__all__ = [
    "MASK_DECODERS",
    "PIXEL_DECODERS",
    "ClipSegmentor",
    "MaskClassificationHead",
    "MaskClassifier",
    "Segmentor",
    "build_mask_decoder",
    "build_model",
    "build_pixel_decoder",
    "stage1_to_stage2",
]
