"""Segmentors: clips of frames in, losses or score maps out."""

from the_mask.modeling.segmentors.base import Segmentor
from the_mask.modeling.segmentors.clip_segmentor import ClipSegmentor
from the_mask.modeling.segmentors.distilled import DistilledSegmentor
from the_mask.modeling.segmentors.head import MaskClassificationHead
from the_mask.modeling.segmentors.mask_classifier import MaskClassifier
from the_mask.modeling.segmentors.propagated import PropagatedSegmentor
from the_mask.modeling.segmentors.scores import label_map, resize_scores, semantic_scores

__all__ = [
    "ClipSegmentor",
    "DistilledSegmentor",
    "MaskClassificationHead",
    "MaskClassifier",
    "PropagatedSegmentor",
    "Segmentor",
    "label_map",
    "resize_scores",
    "semantic_scores",
]
