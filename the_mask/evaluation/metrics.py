"""Confusion matrices of label maps and the metrics computed from them, as pure functions.

Axes: ``K`` classes, ``H W`` frame size. Label maps may be NumPy arrays or CPU tensors of any integer type and shape.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from the_mask.data.label_maps import LabelMap, as_label_array


class IoUReport(TypedDict):
    """The result of :func:`iou_from_confusion`. Fractions in 0..1; NaN where the denominator is 0."""

    mIoU: float
    """Mean IoU over the classes that occur in the ground truth (Detectron2's definition)."""
    mIoU_union: float
    """Mean IoU over the classes that occur in the ground truth or in the predictions (non-zero union)."""
    fwIoU: float
    """IoU weighted by each class's share of the ground truth (VSPW's "weighted IoU")."""
    pACC: float
    """Share of labelled pixels predicted correctly."""
    mACC: float
    """Mean recall over the classes that occur in the ground truth."""
    IoU: NDArray[np.float64]
    """[K]; NaN for a class with an empty union."""
    ACC: NDArray[np.float64]
    """[K] recall; NaN for a class without ground truth."""
    gt_pixels: NDArray[np.int64]
    pred_pixels: NDArray[np.int64]


def confusion_matrix(
    pred: LabelMap, gt: LabelMap, num_classes: int, ignore_label: int = 255, source: str = ""
) -> NDArray[np.int64]:
    """Count pixels by (ground truth, prediction).

    Pixels whose ground truth is ``ignore_label`` are not counted, whatever the prediction.

    Args:
        pred: class ids, any shape.
        gt: class ids of the same shape.
        num_classes: K.
        ignore_label: ground-truth value that is left out; may be outside 0..255.
        source: file name for error messages.

    Returns:
        int64 [K, K], rows = ground truth, columns = prediction.

    Raises:
        ValueError: different shapes, or values outside 0..K-1 (the message has each illegal value and its pixel count).
    """
    pred_array, gt_array = as_label_array(pred, "prediction"), as_label_array(gt, "ground truth")
    if pred_array.shape != gt_array.shape:
        raise ValueError(
            f"{_prefix(source)}prediction has shape {pred_array.shape}, ground truth {gt_array.shape}; must be equal"
        )
    labelled = gt_array != ignore_label
    gt_flat, pred_flat = gt_array[labelled], pred_array[labelled]
    check_labels(gt_flat, num_classes, what="ground truth", source=source, ignore_label=ignore_label)
    check_labels(pred_flat, num_classes, what="prediction", source=source)
    index = gt_flat.astype(np.int64) * num_classes + pred_flat.astype(np.int64)
    return np.bincount(index, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64, copy=False)


def check_labels(
    labels: NDArray[np.integer],
    num_classes: int,
    what: str = "label map",
    source: str = "",
    ignore_label: int | None = None,
) -> None:
    """Raise a ValueError if a value is neither in 0..K-1 nor ``ignore_label``; names each such value.

    Detectron2's evaluator silently counts such pixels in a wrong cell of its matrix.
    """
    if labels.size == 0 or (labels.min() >= 0 and labels.max() < num_classes):
        return
    values, counts = np.unique(labels, return_counts=True)
    illegal = [
        f"{value} ({count} px)"
        for value, count in zip(values.tolist(), counts.tolist(), strict=True)
        if not 0 <= value < num_classes and value != ignore_label
    ]
    if illegal:
        allowed = f"0..{num_classes - 1}" + ("" if ignore_label is None else f" and {ignore_label} (ignored)")
        raise ValueError(f"{_prefix(source)}{what} holds illegal class ids {', '.join(illegal)}; allowed: {allowed}")


def iou_from_confusion(confusion: NDArray[np.integer] | torch.Tensor) -> IoUReport:
    """Compute IoU and accuracy figures from a confusion matrix [K, K] (rows = ground truth).

    Both common definitions of the class mean are given: ``mIoU`` leaves out classes without ground truth, even when
    they are predicted; ``mIoU_union`` counts such a class as 0. See ``docs/metrics.md``.

    Raises:
        ValueError: not a square matrix, or a negative count.
    """
    matrix = as_label_array(confusion, "confusion matrix").astype(np.int64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"a confusion matrix is square, got shape {matrix.shape}")
    if matrix.size and matrix.min() < 0:
        raise ValueError("a confusion matrix holds pixel counts, got a negative one")
    hits = np.diag(matrix)
    gt_pixels, pred_pixels = matrix.sum(axis=1), matrix.sum(axis=0)
    union = gt_pixels + pred_pixels - hits
    iou, recall = _divide(hits, union), _divide(hits, gt_pixels)
    in_gt, in_union = gt_pixels > 0, union > 0
    total = int(gt_pixels.sum())
    return {
        "mIoU": _mean(iou[in_gt]),
        "mIoU_union": _mean(iou[in_union]),
        "fwIoU": float((gt_pixels[in_gt] / total * iou[in_gt]).sum()) if total else float("nan"),
        "pACC": int(hits.sum()) / total if total else float("nan"),
        "mACC": _mean(recall[in_gt]),
        "IoU": iou,
        "ACC": recall,
        "gt_pixels": gt_pixels,
        "pred_pixels": pred_pixels,
    }


def best_constant_class(confusion: NDArray[np.integer]) -> tuple[int, IoUReport]:
    """The class whose constant prediction has the highest mIoU for the ground truth of ``confusion``, and its figures.

    As a constant prediction, class c has the mIoU ``share_c / (classes in the ground truth)``, so the best one is the
    most frequent class. This is the baseline for trained models.
    """
    gt_pixels = np.asarray(confusion, dtype=np.int64).sum(axis=1)
    best = int(gt_pixels.argmax())
    constant = np.zeros((len(gt_pixels), len(gt_pixels)), dtype=np.int64)
    constant[:, best] = gt_pixels
    return best, iou_from_confusion(constant)


def _divide(numerator: NDArray[np.int64], denominator: NDArray[np.int64]) -> NDArray[np.float64]:
    result = np.full(numerator.shape, np.nan, dtype=np.float64)
    return np.divide(numerator, denominator, out=result, where=denominator > 0)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else float("nan")


def _prefix(source: str) -> str:
    return f"{source}: " if source else ""
