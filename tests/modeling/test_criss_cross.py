"""Criss-cross attention against dense attention under a cross-shaped mask."""

import pytest
import torch
from tolerances import assert_close

from the_mask.modeling.pixel.context.criss_cross import (
    CrissCross,
    criss_cross,
    criss_cross_3d,
    criss_cross_query,
    cross_logits,
    time_column,
)
from the_mask.modeling.pixel.context.types import ClipFeatures

B, D, C, H, W = 2, 3, 4, 5, 6


def coordinates(frames=1):
    grid = torch.meshgrid(torch.arange(frames), torch.arange(H), torch.arange(W), indexing="ij")
    return torch.stack([g.flatten() for g in grid], 1)


def dense(query, key, value, allowed):
    """[B, C, N], [B, C, S], [B, V, S], bool [B, N, S] -> [B, V, N]."""
    logits = torch.einsum("bcn,bcs->bns", query, key).masked_fill(~allowed, float("-inf"))
    return torch.einsum("bns,bvs->bvn", logits.softmax(-1), value)


def tensors(*lead, seed=0):
    torch.manual_seed(seed)
    return (torch.randn(*lead, c, H, W).double() for c in (C, C, 7))


def slots_last(x):
    return x.transpose(1, 2).flatten(2)


def test_two_dimensions():
    q, k, v = tensors(B)
    a = coordinates()
    cross = (a[:, None, 1] == a[None, :, 1]) | (a[:, None, 2] == a[None, :, 2])
    assert cross.sum(1).tolist() == [H + W - 1] * (H * W)
    expected = dense(q.flatten(2), k.flatten(2), v.flatten(2), cross.expand(B, -1, -1))
    torch.testing.assert_close(criss_cross(q, k, v).flatten(2), expected)


def test_a_position_counts_once():
    q, k, _ = tensors(B)
    row, column = cross_logits(q, k)
    finite = torch.isfinite(torch.cat([row, column], -1)).sum(-1)
    assert (finite == H + W - 1).all()


@pytest.mark.parametrize("hidden", [[], [0], [0, 1]])
def test_three_dimensions(hidden):
    q, k, v = tensors(B, D)
    valid = torch.ones(B, D, dtype=torch.bool)
    valid[0, hidden] = False
    a = coordinates(D)
    t, i, j = ((a[:, None, x] == a[None, :, x]) for x in range(3))
    in_time = i & j
    cross = (t & i) | (t & j) | in_time
    assert (cross.sum(1) == H + W + D - 2).all()
    seen = (t & (i | j)) | (in_time & valid[:, None, a[:, 0]])
    expected = dense(slots_last(q), slots_last(k), slots_last(v), seen)
    got = criss_cross_3d(q, k, v, valid)
    torch.testing.assert_close(slots_last(got), expected)


@pytest.mark.parametrize("hidden", [[], [1]])
def test_query_mode(hidden):
    q, k, v = tensors(B, D)
    q = q[:, -1]
    valid = torch.ones(B, D, dtype=torch.bool)
    valid[1, hidden] = False
    a, n = coordinates(D), coordinates()
    cross = (n[:, None, 1] == a[None, :, 1]) | (n[:, None, 2] == a[None, :, 2])
    assert (cross.sum(1) == D * (H + W - 1)).all()
    expected = dense(q.flatten(2), slots_last(k), slots_last(v), cross & valid[:, None, a[:, 0]])
    torch.testing.assert_close(criss_cross_query(q, k, v, valid).flatten(2), expected)


def test_time_column():
    q, k, v = tensors(B, D)
    q = q[:, -1]
    valid = torch.tensor([[True] * D, [False, True, True]])
    a, n = coordinates(D), coordinates()
    same = (n[:, None, 1] == a[None, :, 1]) & (n[:, None, 2] == a[None, :, 2])
    expected = dense(q.flatten(2), slots_last(k), slots_last(v), same & valid[:, None, a[:, 0]])
    torch.testing.assert_close(time_column(q, k, v, valid).flatten(2), expected)


def module(mode, recurrence=2, gamma=0.5):
    torch.manual_seed(1)
    block = CrissCross(16, mode, recurrence, D).double()
    for step in (block.space, block.time):
        if step is not None:
            torch.nn.init.constant_(step.gamma, gamma)
    return block


def inputs(valid=None):
    torch.manual_seed(2)
    frames = tuple({"main": torch.randn(B, 16, H, W).double()} for _ in range(D))
    return {"main": torch.randn(B, 16, H, W).double()}, ClipFeatures(
        frames, torch.ones(B, D, dtype=torch.bool) if valid is None else valid
    )


@pytest.mark.parametrize("mode", ["cc2d", "cc3d_full", "cc_separable", "cc_query"])
def test_gamma_zero_is_the_identity(mode):
    now, past = inputs()
    torch.testing.assert_close(module(mode, gamma=0.0)(now, past).feature, now["main"])


@pytest.mark.parametrize("mode", ["cc3d_full", "cc_separable", "cc_query"])
def test_masked_slots_have_no_influence(mode):
    valid = torch.tensor([[False, True, True], [False, False, False]])
    now, past = inputs(valid)
    changed = tuple(
        {"main": torch.where(valid[:, t, None, None, None], f["main"], f["main"] * 3 + 1)}
        for t, f in enumerate(past.frames)
    )
    block = module(mode)
    before = block(now, past).feature
    assert_close(block(now, ClipFeatures(changed, valid)).feature, before, "same")
    whole = ClipFeatures(changed, torch.ones_like(valid))
    assert not torch.allclose(block(now, whole).feature, before)


def test_two_recurrences_reach_every_pixel():
    now, _ = inputs()
    x = now["main"].requires_grad_()
    for recurrence, everywhere in ((1, False), (2, True)):
        y = module("cc2d", recurrence)({"main": x}).feature
        (gradient,) = torch.autograd.grad(y[0, :, 0, 0].sum(), x)
        assert bool((gradient[0].abs().sum(0) > 0).all()) is everywhere


def test_full_equals_query_mode_for_one_step_without_memory_updates():
    """With R = 1 the last slice of the full operator is the 3-D cross of the current frame."""
    now, past = inputs()
    block = module("cc3d_full", recurrence=1)
    clip = torch.stack([f["main"] for f in past.frames] + [now["main"]], 1)
    step = block.space
    q, k, v = (step.frames(conv, clip) for conv in (step.to_query, step.to_key, step.to_value))
    a, n = coordinates(D + 1), coordinates()
    own = a[None, :, 0] == D
    i, j = ((n[:, None, x] == a[None, :, x]) for x in (1, 2))
    allowed = (own & (i | j)) | (i & j)
    expected = dense(q[:, -1].flatten(2), slots_last(k), slots_last(v), allowed.expand(B, -1, -1))
    expected = now["main"] + 0.5 * expected.unflatten(2, (H, W))
    torch.testing.assert_close(block(now, past).feature, expected)
