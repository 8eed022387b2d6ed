"""Costs and losses against loops over single points in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import approx, assert_close

from the_mask.modeling.mask import losses


def bce_cost(logits, targets, valid=None):
    return losses.bce_cost(losses.pairwise_mask_sums(logits, targets, valid))


def dice_cost(logits, targets, valid=None):
    return losses.dice_cost(losses.pairwise_mask_sums(logits, targets, valid))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def bce_loop(x, t, v) -> float:
    """Mean over valid points of t*softplus(-x) + (v - t)*softplus(x)."""
    total = sum(tt * softplus(-xx) + (vv - tt) * softplus(xx) for xx, tt, vv in zip(x, t, v, strict=True))
    return total / sum(v) if sum(v) > 0 else 0.0


def dice_loop(x, t, v) -> float:
    overlap = sum(sigmoid(xx) * tt for xx, tt in zip(x, t, strict=True))
    area = sum(sigmoid(xx) * vv for xx, vv in zip(x, v, strict=True))
    return 1 - (2 * overlap + 1) / (area + sum(t) + 1)


@st.composite
def problems(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    q, n, p = draw(st.integers(0, 5)), draw(st.integers(0, 4)), draw(st.integers(1, 30))
    scale = draw(st.sampled_from([0.1, 3.0, 40.0, 500.0]))
    x = torch.randn(q, p, generator=generator) * scale
    v = torch.rand(p, generator=generator) if draw(st.booleans()) else torch.ones(p)
    v = v * (torch.rand(p, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0])))
    t = torch.rand(n, p, generator=generator) * v
    if draw(st.booleans()):
        t = t.round() * v.round()
        v = v.round()
    return x, t, v


@settings(max_examples=80, deadline=None)
@given(problem=problems())
def test_pairwise_costs_equal_loops(problem):
    x, t, v = problem
    bce, dice = bce_cost(x, t, v), dice_cost(x, t, v)
    assert bce.shape == dice.shape == (len(x), len(t))
    for q in range(len(x)):
        for n in range(len(t)):
            args = (x[q].double().tolist(), t[n].double().tolist(), v.double().tolist())
            # Sums of large terms that cancel: the error scales with the largest logit.
            tolerance = 2e-6 * (1 + float(x.abs().max()) * len(v))
            assert float(bce[q, n]) == pytest.approx(bce_loop(*args), rel=1e-4, abs=tolerance)
            assert float(dice[q, n]) == approx(dice_loop(*args), "network")


@settings(max_examples=60, deadline=None)
@given(problem=problems(), with_valid=st.booleans())
def test_mask_losses_equal_loops(problem, with_valid):
    x, t, v = problem
    maps = min(len(x), len(t))
    x, t = x[:maps], t[:maps]
    valid = v.expand(maps, -1) if with_valid else None
    weights = v.double().tolist() if with_valid else [1.0] * x.shape[1]
    bce, dice = losses.mask_bce_loss(x, t, valid), losses.mask_dice_loss(x, t, valid)
    assert bce.shape == dice.shape == (maps,)
    for m in range(maps):
        args = (x[m].double().tolist(), t[m].double().tolist(), weights)
        assert float(bce[m]) == pytest.approx(bce_loop(*args), rel=1e-4, abs=1e-5 * (1 + float(x.abs().max())))
        assert float(dice[m]) == approx(dice_loop(*args), "network")


def test_pairwise_costs_agree_with_transformers():
    module = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(20, 9000, generator=generator) * 5, torch.rand(7, 9000, generator=generator).round()
    assert_close(bce_cost(x, t), module.pair_wise_sigmoid_cross_entropy_loss(x, t), "layer")
    assert_close(dice_cost(x, t), module.pair_wise_dice_loss(x, t), "layer")


def test_blocks_of_points_add_up():
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(6, 1000, generator=generator), torch.rand(3, 1000, generator=generator)
    v = torch.ones(1000)
    whole = losses.pairwise_mask_sums(x, t, v)
    halves = losses.pairwise_mask_sums(x[:, :400], t[:, :400]).plus(losses.pairwise_mask_sums(x[:, 400:], t[:, 400:]))
    for a, b in zip(whole, halves, strict=True):
        torch.testing.assert_close(a, b)


def test_costs_take_transposed_and_low_precision_input():
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(50, 6, generator=generator), torch.rand(50, 4, generator=generator).round()
    expected = bce_cost(x.t().contiguous(), t.t().contiguous())
    torch.testing.assert_close(bce_cost(x.t(), t.t()), expected)
    half = bce_cost(x.t().bfloat16(), t.t().bfloat16())
    assert half.dtype == torch.float32
    assert_close(half, expected, "half inputs")
    for shape in [(0, 5), (3, 0)]:
        assert dice_cost(torch.zeros(*shape), torch.zeros(2, shape[1])).shape == (shape[0], 2)


def test_extreme_logits_stay_finite_with_finite_gradients():
    x = torch.tensor([[1e4, -1e4, 100.0, -100.0, 0.0]], requires_grad=True)
    for t in (torch.ones(1, 5), torch.zeros(1, 5)):
        loss = losses.mask_bce_loss(x, t) + losses.mask_dice_loss(x, t)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        assert bce_cost(x.detach(), t).isfinite().all()
    wrong = losses.mask_bce_loss(torch.tensor([[1e4]]), torch.zeros(1, 1))
    assert float(wrong) == pytest.approx(1e4)


def test_softplus_and_its_gradient():
    x = torch.cat([torch.linspace(-30, 30, 241), torch.tensor([0.0, -1e4, 1e4])]).requires_grad_()
    exact = x.detach().double().requires_grad_()
    assert_close(losses.softplus(x), torch.logaddexp(exact, torch.zeros_like(exact)), "sum")
    (found,) = torch.autograd.grad(losses.softplus(x).sum(), x)
    assert_close(found, exact.sigmoid(), "sum")
    assert losses.softplus(torch.tensor(float("nan"))).isnan()


def test_losses_have_right_gradients():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    v = torch.rand(3, 6, dtype=torch.float64, generator=generator)
    t = v * torch.rand(3, 6, dtype=torch.float64, generator=generator)
    # The functions compute in float32, so compare with autograd of the float64 definition.
    for function, reference in [
        (losses.mask_bce_loss, lambda y: ((t * F.softplus(-y) + (v - t) * F.softplus(y)).sum(1) / v.sum(1)).sum()),
        (
            losses.mask_dice_loss,
            lambda y: (1 - (2 * (y.sigmoid() * t).sum(1) + 1) / ((y.sigmoid() * v).sum(1) + t.sum(1) + 1)).sum(),
        ),
    ]:
        a, b = x.clone().float().requires_grad_(), x.clone().requires_grad_()
        (got,) = torch.autograd.grad(function(a, t.float(), v.float()).sum(), a)
        (expected,) = torch.autograd.grad(reference(b), b)
        assert_close(got, expected, "sum")


def test_class_cost_is_minus_the_probability():
    logits = torch.randn(4, 6)
    cost = losses.class_cost(logits, torch.tensor([5, 0, 0]))
    assert cost.shape == (4, 3)
    assert float(cost[2, 0]) == approx(-float(logits[2].exp()[5] / logits[2].exp().sum()), "formula")
    assert torch.equal(cost[:, 1], cost[:, 2])
    assert losses.class_cost(logits, torch.zeros(0, dtype=torch.long)).shape == (4, 0)


def test_classification_loss_equals_torch_with_its_own_normaliser():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 10, 5, generator=generator)
    classes = torch.randint(5, (3, 10), generator=generator)
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.1])
    weights = weight[classes]
    got = losses.classification_loss(logits, classes, weights, weights.sum(1))
    for s in range(3):
        torch.testing.assert_close(got[s], F.cross_entropy(logits[s], classes[s], weight))
    nothing = losses.classification_loss(logits, classes, torch.zeros(3, 10), torch.zeros(3))
    assert torch.equal(nothing, torch.zeros(3))


def test_pseudo_targets_are_confident_ground_truth_without_gradient():
    x = torch.tensor([[2.0, -2.0, 2.0, -2.0, 0.0]], requires_grad=True)
    t = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0]])
    pseudo = losses.pseudo_targets(x, t)
    assert pseudo.tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]
    assert not pseudo.requires_grad


def test_mean_over_ranks_is_the_identity_in_one_process():
    values = torch.tensor([1.0, 2.0])
    assert losses.mean_over_ranks(values) is values
