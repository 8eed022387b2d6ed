"""Priors go through the geometry of the image they belong to."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from the_mask.data import augmentation as aug
from the_mask.modeling.pixel.context.prior_map import PriorMap

K, IGNORE = 4, 255


def labels_of(height=12, width=20, seed=0):
    labels = torch.randint(K, (2, height, width), generator=torch.Generator().manual_seed(seed))
    labels[:, 0] = IGNORE
    return labels


def hard(**options):
    return PriorMap.from_labels(labels_of(**options), K)


def soft(seed=0):
    return PriorMap.from_logits(torch.randn(2, K, 12, 20, generator=torch.Generator().manual_seed(seed)))


def assert_same(a, b):
    assert a.is_hard == b.is_hard
    if a.is_hard:
        assert torch.equal(a.labels, b.labels)
    else:
        torch.testing.assert_close(a.probabilities, b.probabilities)


@settings(max_examples=30, deadline=None)
@given(
    scale=st.floats(0.4, 2.2), top=st.floats(0, 1), left=st.floats(0, 1), flip=st.booleans(), seed=st.integers(0, 1000)
)
def test_geometry_of_a_training_clip_commutes_with_the_prior(scale, top, left, flip, seed):
    """Labels through the augmentation of a clip = the prior through the same steps."""
    labels = labels_of(seed=seed)
    resized = aug.fit_size(12, 20, (0, 0), scale)
    height, width = min(8, resized[0]), min(16, resized[1])
    crop = (int(top * (resized[0] - height)), int(left * (resized[1] - width)), height, width)
    geometry = aug.Geometry(resized, crop, flip, (8, 16))
    expected = [aug.transform_label(x.numpy(), geometry, IGNORE) for x in labels]
    prior = PriorMap.from_labels(labels, K).resize(*resized).crop(*crop)
    prior = (prior.flip() if flip else prior).pad(8, 16)
    np.testing.assert_array_equal(prior.labels.numpy(), np.stack(expected))


@pytest.mark.parametrize("make", [hard, soft])
def test_flip_and_crop_commute_with_reading_at_the_stride(make):
    """What the decoder sees (the prior at the features' stride) moves with the image."""
    prior, stride = make(), 4
    small = prior.resize(3, 5)
    window = prior.crop(4, 8, 8, 12)
    if prior.is_hard:
        assert_same(window.resize(2, 3), small.crop(1, 2, 2, 3))
        odd = hard(height=9, width=15)  # at an odd stride no centre falls on a border
        assert_same(odd.flip().resize(3, 5), odd.resize(3, 5).flip())
    else:
        assert_same(prior.flip().resize(3, 5), small.flip())
        inside = window.resize(2, 3).probabilities
        torch.testing.assert_close(inside, small.crop(1, 2, 2, 3).probabilities)
    assert_same(prior.flip().flip(), prior)
    assert_same(prior.flip().crop(0, 0, 12, stride), prior.crop(0, 20 - stride, 12, stride).flip())
    assert_same(prior.pad(16, 24).crop(0, 0, 12, 20), prior)


def test_flip_commutes_except_on_borders_of_cells():
    """At an even stride two cells meet at the centre; the right and lower one is taken."""
    labels = torch.arange(4).view(1, 1, 4)
    assert PriorMap.from_labels(labels, K).resize(1, 2).labels.tolist() == [[[1, 3]]]


def test_ground_truth_bypasses_softmax():
    """One-hot stays one-hot: the true class has all the weight, at any number of classes."""
    labels = torch.arange(124).view(1, 1, 124)
    one_hot = PriorMap.from_labels(labels, 124).soften().probabilities
    assert torch.equal(one_hot[0, :, 0], torch.eye(124))


def test_hard_and_soft():
    prior = hard()
    assert_same(prior.soften().harden(), prior)
    assert torch.equal(prior.unknown(), prior.soften().unknown())
    assert prior.unknown()[:, 0].all()
    assert torch.equal(soft().harden().labels, soft().probabilities.argmax(1))
    logits = torch.randn(1, K, 2, 2, requires_grad=True)
    prior = PriorMap.from_logits(logits)
    assert not prior.probabilities.requires_grad
    torch.testing.assert_close(prior.probabilities.sum(1), torch.ones(1, 2, 2))


def test_bad_priors_are_named():
    with pytest.raises(ValueError, match=r"labels 0..3.*3 classes.*another class list"):
        PriorMap.from_labels(labels_of(), 3)
    with pytest.raises(ValueError, match=r"integer \[B, H, W\]"):
        PriorMap.from_labels(torch.zeros(2, 2), K)
    with pytest.raises(ValueError, match=r"floating point \[B, K, H, W\]"):
        PriorMap.from_probabilities(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match=r"4 classes, the model 7"):
        hard().require(2, (12, 20), 7)
    with pytest.raises(ValueError, match=r"size \(12, 20\).*frames of size \(24, 20\)"):
        hard().require(2, (24, 20), K)
    with pytest.raises(ValueError, match=r"2 maps .* 3 frames"):
        soft().require(3, (12, 20), K)
    with pytest.raises(ValueError, match="leaves"):
        hard().crop(0, 10, 12, 12)
    with pytest.raises(ValueError, match="cannot be padded"):
        hard().pad(8, 20)
    assert hard().require(2, (12, 20), K).batch == 2
