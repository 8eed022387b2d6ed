"""Metrics as pure functions on label maps, evaluators, the prediction loop, and reports."""

from the_mask.evaluation.baseline import constant_baseline
from the_mask.evaluation.evaluate import evaluate_dataset
from the_mask.evaluation.evaluator import VideoSemSegEvaluator
from the_mask.evaluation.metrics import best_constant_class, confusion_matrix, iou_from_confusion
from the_mask.evaluation.predictions import PredictionErrors, evaluate_predictions
from the_mask.evaluation.temporal_consistency import (
    TemporalConsistency,
    raft_flow,
    temporal_consistency,
    warp_labels,
)
from the_mask.evaluation.video_consistency import VideoConsistency, video_consistency

__all__ = [
    "PredictionErrors",
    "TemporalConsistency",
    "VideoConsistency",
    "VideoSemSegEvaluator",
    "best_constant_class",
    "confusion_matrix",
    "constant_baseline",
    "evaluate_dataset",
    "evaluate_predictions",
    "iou_from_confusion",
    "raft_flow",
    "temporal_consistency",
    "video_consistency",
    "warp_labels",
]
