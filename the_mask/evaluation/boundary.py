"""Boundary IoU: IoU of the pixels near a class border, in the prediction or in the ground truth.

Source: Cheng et al. 2021, "Boundary IoU", eq. 2, per class and pooled over frames. Axes: K classes, H W frame size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from the_mask.data.label_maps import LabelMap, as_label_array

PAPER_RATIO = 0.02


def boundary_width(height: int, width: int, ratio: float = PAPER_RATIO) -> int:
    """Width (pixels) of the boundary: ``ratio`` of the diagonal, rounded, at least 1."""
    return max(1, round(ratio * float(np.hypot(height, width))))


def boundary_region(
    labels: NDArray[np.integer], width: int, void: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_]:
    """Pixels less than ``width`` + 1 away (Chebyshev) from a pixel of another class or from outside the frame.

    For each class this is the mask minus its erosion by a square of side 2 * width + 1, as in the paper's code. All
    classes are computed at once: a pixel is inside if all labels around it are equal. Void pixels have no class, so a
    border with them is not a boundary.

    Args:
        labels: class ids [H, W], 0..65534.
        width: pixels, >= 1.
        void: [H, W]; None means no void pixels.

    Returns:
        [H, W]; False at void pixels.

    Raises:
        ValueError: ``width`` < 1.
    """
    if width < 1:
        raise ValueError(f"a boundary is at least 1 pixel wide, got {width}")
    low = labels.astype(np.uint16)
    high = low.copy()
    if void is not None:
        low[void] = np.iinfo(np.uint16).max
        high[void] = 0
    square = np.ones((2 * width + 1, 2 * width + 1), dtype=np.uint8)
    # OpenCV ignores pixels outside the frame in minimum and maximum.
    region = cv2.erode(low, square) != cv2.dilate(high, square)
    region[:width] = region[-width:] = True
    region[:, :width] = region[:, -width:] = True
    if void is not None:
        region &= ~void
    return region


def boundary_counts(
    pred: LabelMap, gt: LabelMap, num_classes: int, width: int, ignore_label: int = 255
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Intersection and union (pixels) of the boundary regions of each class.

    Pixels whose ground truth is ``ignore_label`` are not counted, and a border with them is not a boundary.

    Returns:
        Two int64 [K].

    Raises:
        ValueError: different shapes.
    """
    pred_array, gt_array = as_label_array(pred, "prediction"), as_label_array(gt, "ground truth")
    if pred_array.shape != gt_array.shape:
        raise ValueError(f"prediction has shape {pred_array.shape}, ground truth {gt_array.shape}; must be equal")
    void = gt_array == ignore_label
    in_pred = boundary_region(pred_array, width, void)
    in_gt = boundary_region(np.where(void, 0, gt_array), width, void)

    def count(labels: NDArray[np.integer], where: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(labels[where], minlength=num_classes)[:num_classes].astype(np.int64)

    both = count(gt_array, in_pred & in_gt & (pred_array == gt_array))
    return both, count(pred_array, in_pred) + count(gt_array, in_gt) - both


@dataclass
class BoundaryIoU:
    """Boundary IoU pooled over frames.

    Attributes:
        num_classes: K.
        ratio: width of the boundary as a share of a frame's diagonal.
        ignore_label: value of the ground truth that is left out.
        intersection, union: int64 [K].
        in_gt: bool [K], classes that occur in the ground truth.
    """

    num_classes: int
    ratio: float = PAPER_RATIO
    ignore_label: int = 255
    intersection: NDArray[np.int64] = field(init=False)
    union: NDArray[np.int64] = field(init=False)
    in_gt: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(
                f"TEST.BOUNDARY_RATIO {self.ratio}: expected a share of the diagonal in 0..1 (paper: 0.02)"
            )
        self.intersection = np.zeros(self.num_classes, dtype=np.int64)
        self.union = np.zeros(self.num_classes, dtype=np.int64)
        self.in_gt = np.zeros(self.num_classes, dtype=np.bool_)

    def update(self, pred: LabelMap, gt: LabelMap) -> None:
        """Add a frame."""
        gt_array = as_label_array(gt, "ground truth")
        width = boundary_width(gt_array.shape[0], gt_array.shape[1], self.ratio)
        intersection, union = boundary_counts(pred, gt_array, self.num_classes, width, self.ignore_label)
        self.intersection += intersection
        self.union += union
        present = np.unique(gt_array)
        self.in_gt[present[present != self.ignore_label]] = True

    def merge(self, other: BoundaryIoU) -> None:
        """Add the frames of another process."""
        self.intersection = self.intersection + other.intersection
        self.union = self.union + other.union
        self.in_gt = self.in_gt | other.in_gt

    def result(self) -> float:
        """Mean over the classes of the ground truth, 0..1; NaN if there are none."""
        if not self.in_gt.any():
            return float("nan")
        return float((self.intersection[self.in_gt] / np.maximum(self.union[self.in_gt], 1)).mean())
