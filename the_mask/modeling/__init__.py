"""Models. Importing this package fills the registries: backbones, heads, decoders, segmentors."""

from detectron2.modeling import build_model

from the_mask.modeling import backbones as backbones
from the_mask.modeling import mask as mask
from the_mask.modeling import pixel as pixel
from the_mask.modeling import propagation as propagation
from the_mask.modeling.mask import (
    MASK_DECODERS,
    PIXEL_DECODERS,
    MaskClassificationHead,
    MaskClassifier,
    build_mask_decoder,
    build_pixel_decoder,
    stage1_to_stage2,
)
from the_mask.modeling.pixel import ClipSegmentor, DistilledSegmentor
from the_mask.modeling.propagation import PropagatedSegmentor
from the_mask.modeling.segmentor import Segmentor

__all__ = [
    "MASK_DECODERS",
    "PIXEL_DECODERS",
    "ClipSegmentor",
    "DistilledSegmentor",
    "MaskClassificationHead",
    "MaskClassifier",
    "PropagatedSegmentor",
    "Segmentor",
    "build_mask_decoder",
    "build_model",
    "build_pixel_decoder",
    "stage1_to_stage2",
]
