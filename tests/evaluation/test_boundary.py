"""Boundary IoU against per-class erosion by brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from the_mask.evaluation.boundary import BoundaryIoU, boundary_counts, boundary_region, boundary_width


def slow_boundary(mask, void, width):
    """Mask [H, W] minus its erosion: pixels with a foreign, non-void pixel or the outside within ``width``."""
    height, columns = mask.shape
    result = np.zeros_like(mask)
    for y, x in np.argwhere(mask & ~void):
        for v in range(y - width, y + width + 1):
            for u in range(x - width, x + width + 1):
                outside = not (0 <= v < height and 0 <= u < columns)
                if outside or not (mask[v, u] or void[v, u]):
                    result[y, x] = True
    return result


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.booleans())
def test_counts_equal_brute_force(seed, height, width, border, with_void):
    rng = np.random.default_rng(seed)
    classes = 3
    gt = np.kron(rng.integers(0, classes, (3, 3)), np.ones((3, 3), dtype=int))[:height, :width].astype(np.uint8)
    pred = np.where(rng.random(gt.shape) < 0.2, rng.integers(0, classes, gt.shape), gt).astype(np.uint8)
    if with_void:
        gt[rng.random(gt.shape) < 0.2] = 255
    void = gt == 255
    intersection, union = boundary_counts(pred, torch.from_numpy(gt), classes, border)
    for c in range(classes):
        p, g = (slow_boundary((labels == c) & ~void, void, border) for labels in (pred, gt))
        assert intersection[c] == (p & g).sum()
        assert union[c] == (p | g).sum()


def test_against_the_papers_recipe():
    """Without void: mask minus the erosion of the mask in a frame of zeros, 3x3 per step."""
    import cv2

    labels = np.zeros((40, 50), dtype=np.int64)
    labels[10:30, 15:45] = 1
    labels[20:, :20] = 2
    for width in (1, 4):
        region = boundary_region(labels, width)
        for c in range(3):
            mask = (labels == c).astype(np.uint8)
            padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
            eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1]
            assert ((mask - eroded).astype(bool) == (region & (labels == c))).all()


def test_it_sees_borders_that_iou_hardly_sees():
    gt = np.zeros((100, 100), dtype=np.uint8)
    gt[20:80, 20:80] = 1
    pred = np.zeros_like(gt)
    pred[22:78, 22:78] = 1
    meter = BoundaryIoU(2)
    meter.update(pred, gt)
    iou = 56**2 / 60**2
    assert boundary_width(100, 100) == 3
    assert meter.result() < iou - 0.2
    perfect = BoundaryIoU(2)
    perfect.update(gt, gt)
    assert perfect.result() == 1


def test_pooling_and_merging():
    rng = np.random.default_rng(0)
    frames = [(rng.integers(0, 4, (20, 30)), rng.integers(0, 3, (20, 30))) for _ in range(4)]
    whole, parts = BoundaryIoU(4), [BoundaryIoU(4), BoundaryIoU(4)]
    for index, (pred, gt) in enumerate(frames):
        whole.update(pred, gt)
        parts[index % 2].update(pred, gt)
    parts[0].merge(parts[1])
    assert parts[0].result() == whole.result()
    # Class 3 is predicted but never in the ground truth.
    assert whole.result() == pytest.approx(np.mean(whole.intersection[:3] / whole.union[:3]))
    assert np.isnan(BoundaryIoU(4).result())


def test_bad_input():
    with pytest.raises(ValueError, match=r"BOUNDARY_RATIO 1\.5"):
        BoundaryIoU(2, 1.5)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        boundary_region(np.zeros((3, 3), dtype=int), 0)
    with pytest.raises(ValueError, match="must be equal"):
        boundary_counts(np.zeros((3, 3), dtype=int), np.zeros((3, 4), dtype=int), 2, 1)
