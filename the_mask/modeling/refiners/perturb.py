"""Makes coarse masks from good ones, to train refiners on. Axes: H W mask size. Source: CascadePSP, section 4.1."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
MAX_ROUNDS = 250
LEAST_IOU = 0.8
# For contours: the share cut out in one piece, and the share of the remaining vertices that is kept.
CUT_SHARE = 0.1
KEPT_SHARE = 0.1
FLIP_PROBABILITY = 0.02
FLIP_ROUND_PROBABILITY = 0.1


def perturb_mask(mask: Mask, rng: np.random.Generator, target_iou: float | None = None) -> Mask:
    """Simplify the contours, then dilate and erode random places until the IoU with the mask falls below a target.

    Args:
        mask: bool [H, W].
        rng: source of all randomness.
        target_iou: None draws it from U(0.8, 1).

    Returns:
        bool [H, W]. An empty mask stays empty; a mask that fills the frame may change only in places.
    """
    target = rng.uniform(LEAST_IOU, 1.0) if target_iou is None else target_iou
    if not mask.any():
        return mask.copy()
    result = simplify_contours(mask, rng)
    # Coarser than the target already (thin shapes vanish): start from the mask itself.
    if mask_iou(result, mask) < target:
        result = mask.copy()
    for _ in range(MAX_ROUNDS):
        if mask_iou(result, mask) < target:
            break
        result = _disturb(result, rng)
    return result


def simplify_contours(mask: Mask, rng: np.random.Generator) -> Mask:
    """Cut a contiguous tenth out of every contour, keep a random tenth of its other vertices, and fill it again."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    kept = []
    for contour in contours:
        start, cut = int(rng.integers(len(contour))), int(len(contour) * CUT_SHARE)
        rest = np.roll(contour, -start, axis=0)[cut:]
        chosen = rng.random(len(rest)) < KEPT_SHARE
        if chosen.sum() >= 3:
            kept.append(rest[chosen])
    canvas = np.zeros(mask.shape, dtype=np.uint8)
    if kept:
        # Fill holes and outlines together: the even-odd rule keeps the holes open.
        cv2.fillPoly(canvas, kept, 1)
    return canvas.astype(bool)


def mask_iou(first: Mask, second: Mask) -> float:
    """Intersection over union; 1 for two empty masks."""
    union = int((first | second).sum())
    return float((first & second).sum() / union) if union else 1.0


def _disturb(mask: Mask, rng: np.random.Generator) -> Mask:
    """Dilate or erode inside one random rectangle with a random kernel; now and then flip random pixels of it."""
    height, width = mask.shape
    top, left = int(rng.integers(height)), int(rng.integers(width))
    bottom = min(height, top + int(rng.integers(max(height // 8, 2), max(height // 2, 3))))
    right = min(width, left + int(rng.integers(max(width // 8, 2), max(width // 2, 3))))
    box = (slice(top, bottom), slice(left, right))
    size = int(rng.integers(3, 10))
    shape = cv2.MORPH_RECT if rng.random() < 0.5 else cv2.MORPH_ELLIPSE
    change = cv2.dilate if rng.random() < 0.5 else cv2.erode
    result = mask.copy()
    part = np.ascontiguousarray(mask[box]).astype(np.uint8)
    result[box] = change(part, cv2.getStructuringElement(shape, (size, size))).astype(bool)
    if rng.random() < FLIP_ROUND_PROBABILITY:
        result[box] ^= rng.random(part.shape) < FLIP_PROBABILITY
    return result
