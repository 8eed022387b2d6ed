"""Per-pixel cross-entropy and OHEM against brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import approx
from torch.nn import functional as F

from the_mask.modeling.pixel.pixel_loss import HardPixels, pixel_loss


def brute_force(probabilities, labels, threshold, min_kept):
    """Pixels [(probability of its own class, position)] that OHEM keeps: below the bar, or among the hardest."""
    batch = labels.shape[0]
    pixels = []
    for b, i, j in torch.nonzero(labels != 255).tolist():
        pixels.append((float(probabilities[b, labels[b, i, j], i, j]), (b, i, j)))
    pixels.sort()
    kept = {where for p, where in pixels if p < threshold}
    return kept | {where for _, where in pixels[: min_kept * batch]}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), threshold=st.sampled_from([0.0, 0.3, 0.7, 1.0]), min_kept=st.integers(1, 40))
def test_ohem_keeps_what_brute_force_keeps(seed, threshold, min_kept):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(4, (2, 5, 6), generator=generator)
    labels[torch.rand(2, 5, 6, generator=generator) < 0.3] = 255
    losses = F.cross_entropy(logits, labels, ignore_index=255, reduction="none")
    kept = HardPixels(threshold, min_kept)(losses, labels != 255)
    expected = brute_force(logits.softmax(1), labels, threshold, min_kept)
    assert set(map(tuple, torch.nonzero(kept).tolist())) == expected
    loss = pixel_loss(logits, labels, 255, HardPixels(threshold, min_kept))
    mean = sum(-math.log(float(logits.softmax(1)[b, labels[b, i, j], i, j])) for b, i, j in expected) / len(expected)
    assert float(loss) == approx(mean, "formula")


def test_plain_loss_is_the_mean_over_valid_pixels_at_label_size():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, 6)
    labels = torch.randint(4, (2, 10, 12))
    labels[0, :4] = 255
    big = F.interpolate(logits, size=(10, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(pixel_loss(logits, labels, 255), F.cross_entropy(big, labels, ignore_index=255))


@pytest.mark.parametrize("sampler", [None, HardPixels()])
def test_nothing_to_learn_is_zero_with_a_graph(sampler):
    logits = torch.randn(1, 4, 5, 6, requires_grad=True)
    loss = pixel_loss(logits, torch.full((1, 5, 6), 255), 255, sampler)
    loss.backward()
    assert float(loss.detach()) == 0
    assert (logits.grad == 0).all()


def test_loss_is_in_float32_under_autocast():
    logits = torch.randn(1, 4, 5, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = pixel_loss(logits, torch.zeros(1, 5, 6, dtype=torch.int64), 255)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("bad", [{"threshold": 1.2}, {"min_kept": 0}])
def test_bad_ohem_options(bad):
    with pytest.raises(ValueError, match=r"MODEL.CLIP_SEGMENTOR.OHEM"):
        HardPixels(**bad)


def test_class_weights_are_those_of_torch():
    """The weighted mean of torch, ignored pixels left out; with OHEM the same over the pixels that it keeps."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 5, 6), torch.randint(4, (2, 5, 6))
    labels[0, :2] = 255
    weights = torch.tensor([0.5, 2.0, 1.0, 0.0])
    expected = F.cross_entropy(logits, labels, weights, ignore_index=255)
    torch.testing.assert_close(pixel_loss(logits, labels, 255, class_weights=weights), expected)
    hard = HardPixels(0.2, 3)
    kept = hard(F.cross_entropy(logits, labels, ignore_index=255, reduction="none"), labels != 255)
    assert 0 < kept.sum() < (labels != 255).sum()
    expected = F.cross_entropy(logits, labels.where(kept, 255), weights, ignore_index=255)
    torch.testing.assert_close(pixel_loss(logits, labels, 255, hard, weights), expected)
    nothing = pixel_loss(logits, torch.full_like(labels, 255), 255, class_weights=weights)
    assert nothing == 0
