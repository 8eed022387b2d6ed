"""Confusion matrix and IoU against naive loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from the_mask.evaluation.metrics import best_constant_class, confusion_matrix, iou_from_confusion


def naive_confusion(pred, gt, num_classes, ignore_label):
    matrix = [[0] * num_classes for _ in range(num_classes)]
    for p, g in zip(pred.ravel().tolist(), gt.ravel().tolist(), strict=True):
        if g != ignore_label:
            matrix[g][p] += 1
    return matrix


def naive_report(pred, gt, num_classes, ignore_label):
    """IoU by counting pixels of each class directly, without a matrix."""
    pairs = [(p, g) for p, g in zip(pred.ravel().tolist(), gt.ravel().tolist(), strict=True) if g != ignore_label]
    ious, recalls, weights = {}, {}, {}
    for c in range(num_classes):
        both = sum(1 for p, g in pairs if p == c and g == c)
        either = sum(1 for p, g in pairs if p == c or g == c)
        truth = sum(1 for _, g in pairs if g == c)
        if either:
            ious[c] = both / either
        if truth:
            recalls[c] = both / truth
            weights[c] = truth / len(pairs)
    nan = float("nan")
    return {
        "mIoU": sum(ious[c] for c in recalls) / len(recalls) if recalls else nan,
        "mIoU_union": sum(ious.values()) / len(ious) if ious else nan,
        "fwIoU": sum(weights[c] * ious[c] for c in recalls) if recalls else nan,
        "pACC": sum(1 for p, g in pairs if p == g) / len(pairs) if pairs else nan,
        "mACC": sum(recalls.values()) / len(recalls) if recalls else nan,
    }


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6), st.integers(0, 5), st.integers(0, 7), st.integers(0, 2**31), st.sampled_from([255, 65535, -1])
)
def test_matches_naive_loops(num_classes, height, width, seed, ignore_label):
    rng = np.random.default_rng(seed)
    pred = rng.integers(0, num_classes, (height, width))
    gt = rng.integers(0, num_classes, (height, width))
    gt[rng.random(gt.shape) < 0.3] = ignore_label
    matrix = confusion_matrix(pred, gt, num_classes, ignore_label)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == naive_confusion(pred, gt, num_classes, ignore_label)
    report = iou_from_confusion(matrix)
    for name, value in naive_report(pred, gt, num_classes, ignore_label).items():
        assert report[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name


def test_known_answer():
    gt = np.array([[0, 0, 1, 1], [0, 0, 255, 1]])
    pred = np.array([[0, 0, 1, 2], [0, 1, 2, 1]])
    report = iou_from_confusion(confusion_matrix(pred, gt, 4))
    # Class 0: 3/4, class 1: 2/4, class 2: predicted once, never true: 0; class 3: nowhere.
    assert report["mIoU"] == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert report["mIoU_union"] == pytest.approx((3 / 4 + 2 / 4 + 0) / 3)
    assert report["fwIoU"] == pytest.approx(4 / 7 * 3 / 4 + 3 / 7 * 2 / 4)
    assert report["pACC"] == pytest.approx(5 / 7)
    assert report["mACC"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert report["IoU"][2] == 0
    assert math.isnan(report["IoU"][3])
    assert math.isnan(report["ACC"][2])
    assert report["gt_pixels"].tolist() == [4, 3, 0, 0]
    assert report["pred_pixels"].tolist() == [3, 3, 1, 0]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_every_integer_type_and_layout(dtype):
    rng = np.random.default_rng(0)
    pred, gt = rng.integers(0, 3, (2, 6, 8)).astype(dtype)
    gt[0, 0] = 100
    expected = naive_confusion(pred, gt, 3, 100)
    assert confusion_matrix(pred, gt, 3, 100).tolist() == expected
    assert confusion_matrix(pred.T[::-1], gt.T[::-1], 3, 100).tolist() == expected
    assert confusion_matrix(torch.from_numpy(pred), torch.from_numpy(gt), 3, 100).tolist() == expected


def test_prediction_may_hold_anything_where_the_ground_truth_is_void():
    matrix = confusion_matrix(np.array([255, 9, 1]), np.array([255, 255, 1]), 2)
    assert matrix.tolist() == [[0, 0], [0, 1]]


def test_more_than_256_classes():
    pred, gt = np.array([300, 299, 255]), np.array([300, 300, 255])
    matrix = confusion_matrix(pred, gt, 301, ignore_label=65535)
    assert matrix[300].tolist()[299:] == [1, 1]
    assert matrix[255, 255] == 1


@pytest.mark.parametrize(
    ("pred", "gt", "message"),
    [
        (
            [0, 1],
            [0, 2],
            r"a\.png: ground truth holds illegal class ids 2 \(1 px\); allowed: 0\.\.1 and 255",
        ),
        ([3, 3], [0, 1], r"a\.png: prediction holds illegal class ids 3 \(2 px\); allowed: 0\.\.1"),
        ([0, -1], [0, 1], r"prediction holds illegal class ids -1 \(1 px\)"),
        ([0], [0, 1], r"prediction has shape \(1,\), ground truth \(2,\)"),
        ([0.0, 1.0], [0, 1], r"prediction holds float64 values"),
    ],
)
def test_illegal_values_are_named(pred, gt, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(pred), np.array(gt), 2, source="a.png")


def test_empty_matrix_gives_nan_not_zero():
    report = iou_from_confusion(np.zeros((3, 3), dtype=np.int64))
    for name in ("mIoU", "mIoU_union", "fwIoU", "pACC", "mACC"):
        assert math.isnan(report[name])


def test_bad_matrices():
    with pytest.raises(ValueError, match="square"):
        iou_from_confusion(np.zeros((2, 3), dtype=np.int64))
    with pytest.raises(ValueError, match="negative"):
        iou_from_confusion(np.array([[1, 0], [0, -1]]))


def test_best_constant_class_is_the_best_of_all_constants():
    rng = np.random.default_rng(3)
    gt = rng.choice([0, 1, 2, 2, 2, 255], (20, 30))
    confusion = confusion_matrix(rng.integers(0, 4, gt.shape), gt, 4)
    scores = [iou_from_confusion(confusion_matrix(np.full_like(gt, c), gt, 4))["mIoU"] for c in range(4)]
    best, report = best_constant_class(confusion)
    assert best == int(np.argmax(scores)) == 2
    assert report["mIoU"] == pytest.approx(max(scores))
