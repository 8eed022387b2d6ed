"""Normalisation and means of score maps, against float64."""

import math

import pytest
import torch
from tolerances import assert_close

from the_mask.inference.merge import ScoreMean, merge_scores, normalize_scores, score_labels


def maps(count, classes=4, seed=0):
    return list(torch.rand(count, classes, 5, 6, generator=torch.Generator().manual_seed(seed)) * 3)


def test_normalisations_against_float64():
    (scores,) = maps(1)
    exact = scores.double()
    assert_close(normalize_scores(scores, "sum-to-one"), exact / exact.sum(0), "formula")
    assert_close(normalize_scores(scores, "softmax"), exact.exp() / exact.exp().sum(0), "formula")
    power = exact ** (1 / 2.5)
    assert_close(normalize_scores(scores, "temperature", 2.5), power / power.sum(0), "formula")
    assert torch.equal(normalize_scores(scores, "none"), scores)


def test_temperature_on_a_softmax_divides_the_logits():
    logits = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0))
    assert_close(normalize_scores(logits.softmax(0), "temperature", 3.0), (logits / 3).softmax(0), "sum")


def test_sum_to_one_of_nothing_is_uniform():
    assert torch.equal(normalize_scores(torch.zeros(4, 2, 2), "sum-to-one"), torch.full((4, 2, 2), 0.25))


def test_the_second_softmax_flattens_as_the_specification_says():
    """K = 124: a perfect score of 1 becomes e / (e + 123)."""
    perfect = torch.zeros(124, 1, 1)
    perfect[7] = 1
    flattened = normalize_scores(perfect, "softmax")
    assert flattened[7].item() == pytest.approx(math.e / (math.e + 123))
    assert flattened[7].item() == pytest.approx(0.0216, abs=1e-4)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize("normalization", ["none", "sum-to-one", "softmax", "temperature"])
def test_a_model_with_itself_is_that_model(mean, normalization):
    (scores,) = maps(1)
    merged = merge_scores([scores] * 3, normalization, mean, [0.2, 1.0, 3.0])
    assert_close(merged, normalize_scores(scores, normalization), "sum")


def test_weighted_means_against_float64():
    three, weights = maps(3), [0.5, 1.0, 2.5]
    stacked = torch.stack(three).double()
    w = torch.tensor(weights, dtype=torch.float64)[:, None, None, None]
    assert_close(merge_scores(three, weights=weights), (stacked * w).sum(0) / w.sum(), "formula")
    assert_close(
        merge_scores(three, mean="geometric", weights=weights), ((stacked.log() * w).sum(0) / w.sum()).exp(), "formula"
    )


def test_half_precision_is_accumulated_in_float32():
    tiny = [torch.full((1, 1, 1), 1.0, dtype=torch.float16)] + [torch.full((1, 1, 1), 2**-12, dtype=torch.float16)] * 4
    assert merge_scores(tiny).item() == pytest.approx((1 + 4 * 2**-12) / 5, rel=1e-7)


def test_labels_take_the_lowest_of_equal_classes():
    assert score_labels(torch.ones(300, 2, 2)).dtype == torch.int32
    labels = score_labels(torch.tensor([0.1, 0.4, 0.4])[:, None, None])
    assert labels.dtype == torch.uint8
    assert labels.item() == 1


def test_bad_merges():
    with pytest.raises(ValueError, match="normalisation 'l1'"):
        normalize_scores(torch.ones(2, 1, 1), "l1")
    with pytest.raises(ValueError, match="temperature 0"):
        normalize_scores(torch.ones(2, 1, 1), "temperature", 0)
    with pytest.raises(ValueError, match="no score maps"):
        ScoreMean().result()
    with pytest.raises(ValueError, match="cannot be averaged"):
        merge_scores([torch.ones(2, 3, 3), torch.ones(2, 3, 4)])
    with pytest.raises(ValueError, match="expected a number > 0"):
        merge_scores([torch.ones(2, 3, 3)], weights=[0.0])
    with pytest.raises(ValueError, match="mean 'median'"):
        ScoreMean("median")
