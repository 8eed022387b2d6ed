"""Class scores and label maps against einsum and two full interpolations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from the_mask.modeling.scores import clip_scores, label_map, resize_scores, semantic_scores


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_semantic_scores_equal_einsum(chunk):
    logits, masks = random(6, 5), random(6, 8, 9, seed=1)
    expected = torch.einsum("qc,qhw->chw", logits.double().softmax(-1)[:, :-1], masks.double().sigmoid())
    scores = semantic_scores(logits, masks, chunk)
    assert scores.dtype == torch.float32
    assert_close(scores, expected, "formula")


def test_semantic_scores_of_a_strided_half_precision_mask():
    logits, masks = random(6, 5), random(8, 6, 9, seed=1).transpose(0, 1)
    expected = semantic_scores(logits, masks.contiguous())
    assert torch.equal(semantic_scores(logits, masks), expected)
    half = semantic_scores(logits.bfloat16(), masks.bfloat16())
    assert half.dtype == torch.float32
    assert_close(half, expected, "half inputs")


class LargestTensor(TorchDispatchMode):
    """Numbers of elements of the largest tensor that is made inside the block."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("chunk", [1, 100, 10_000])
@pytest.mark.parametrize("enlarge", [2, 4])
def test_enlarged_masks_are_merged_as_released(chunk, enlarge):
    """Mask2Former: enlarge Q masks, sigmoid, einsum; here without a tensor of Q large masks."""
    logits, masks = random(40, 4), 5 * random(40, 9, 13, seed=1)
    size = [side * enlarge for side in masks.shape[1:]]
    large = F.interpolate(masks[None].double(), size=size, mode="bilinear", align_corners=False)[0]
    expected = torch.einsum("qc,qhw->chw", logits.double().softmax(-1)[:, :-1], large.sigmoid())
    with LargestTensor() as largest:
        scores = semantic_scores(logits, masks, chunk, enlarge)
    assert_close(scores, expected, "layer")
    if chunk <= 100:
        assert largest.elements < large.numel() // 2
    half = semantic_scores(logits.bfloat16(), masks.bfloat16(), chunk, enlarge)
    assert half.dtype == torch.float32


def test_no_object_adds_nothing():
    logits = torch.tensor([[-50.0, -50.0, 50.0]])
    assert semantic_scores(logits, torch.full((1, 2, 2), 9.0)).max() < 1e-30


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_clip_scores_average_the_branches(weight):
    outputs = {
        "pred_logits": random(2, 6, 5),
        "pred_masks": random(2, 6, 3, 4, 4, seed=1),
        "frame": {"pred_logits": random(2, 3, 6, 5, seed=2), "pred_masks": random(2, 6, 3, 4, 4, seed=3)},
    }
    scores = clip_scores(outputs, 1, weight)
    assert scores.shape == (3, 4, 4, 4)
    for t in range(3):
        clip = semantic_scores(outputs["pred_logits"][1], outputs["pred_masks"][1, :, t])
        frame = semantic_scores(outputs["frame"]["pred_logits"][1, t], outputs["frame"]["pred_masks"][1, :, t])
        torch.testing.assert_close(scores[t], weight * clip + (1 - weight) * frame)
    del outputs["frame"]
    torch.testing.assert_close(
        clip_scores(outputs, 1, weight)[0], semantic_scores(outputs["pred_logits"][1], outputs["pred_masks"][1, :, 0])
    )


def two_steps(scores, network_size, output_size, stride):
    """The definition: upsample by the stride, cut the padding, resize."""
    size = [side * stride for side in scores.shape[-2:]]
    full = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)
    full = full[..., : network_size[0], : network_size[1]]
    return F.interpolate(full, size=output_size, mode="bilinear", align_corners=False)[0]


sides = st.integers(1, 40)


@given(sides, sides, sides, sides, st.sampled_from([1, 2, 4, 8]), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_tiles_equal_two_interpolations(height, width, out_height, out_width, stride, tile):
    network, output = (height, width), (out_height, out_width)
    scores = random(3, math.ceil(height / stride), math.ceil(width / stride), seed=height * width)
    expected = two_steps(scores, network, output, stride)
    assert_close(resize_scores(scores, network, output, stride), expected, "layer")
    tiles = [
        resize_scores(scores, network, output, stride, slice(start, start + tile))
        for start in range(0, out_height, tile)
    ]
    assert_close(torch.cat(tiles, dim=1), expected, "layer")


@pytest.mark.parametrize("output", [(48, 64), (45, 61), (96, 100), (20, 30)])
def test_label_map_equals_the_untiled_argmax(output):
    """At every pixel whose best two classes differ by more than rounding."""
    scores = random(7, 12, 16)
    full = two_steps(scores, (48, 64), output, 4)
    labels = label_map(scores, (48, 64), output, 4)
    assert labels.dtype == torch.uint8
    assert labels.shape == output
    best = full.topk(2, dim=0).values
    clear = best[0] - best[1] > 1e-4
    assert clear.float().mean() > 0.99
    assert torch.equal(labels[clear].long(), full.argmax(0)[clear])


def test_many_classes_need_more_than_a_byte():
    scores = torch.zeros(300, 2, 2)
    scores[299, 0] = 1.0
    labels = label_map(scores, (2, 2), (2, 2), 1)
    assert labels.dtype == torch.int32
    assert labels.tolist() == [[299, 299], [0, 0]]


def test_label_map_of_255_classes_fits_a_byte():
    scores = torch.zeros(255, 1, 1)
    scores[254] = 1.0
    labels = label_map(scores, (1, 1), (2, 2), 1)
    assert labels.dtype == torch.uint8
    assert labels.tolist() == [[254, 254], [254, 254]]


def test_the_first_of_equal_classes_wins():
    scores = torch.randint(3, (40, 30, 50), generator=torch.Generator().manual_seed(0)).float()
    labels = label_map(scores, (30, 50), (30, 50), 1)
    expected = np.argmax(scores.numpy(), axis=0)
    assert np.array_equal(labels.numpy(), expected)
    assert len(np.unique(expected)) > 5
