"""The schedule against torch's own schedulers and hand-made numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from the_mask.config import load_config
from the_mask.engine.schedule import WarmupPoly, poly_factor, warmup_factor


def test_poly_equals_torch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    oracle = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=40, power=0.9)
    ours = WarmupPoly(base_lr=0.3, max_iter=40)
    for iteration in range(45):
        assert ours(iteration) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15)
        optimizer.step()
        oracle.step()


def test_warmup_equals_torch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=8)
    for iteration in range(12):
        assert warmup_factor(iteration, 8, 0.01) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        oracle.step()


def test_known_values() -> None:
    schedule = WarmupPoly(1e-4, 160_000)
    assert schedule(0) == 1e-4
    assert schedule(80_000) == pytest.approx(1e-4 * 0.5**0.9)
    assert schedule(159_999) > 0
    floor = WarmupPoly(1.0, 10, power=1.0, end=0.25, warmup_iters=2, warmup_start=0.5, warmup_method="constant")
    assert [floor(i) for i in (0, 1, 2, 7, 8, 9)] == pytest.approx([0.5, 0.45, 0.8, 0.3, 0.25, 0.25])


def test_poly_with_floor() -> None:
    """TMANet on CamVid: SGD 0.01, power 0.9, floor 1e-4 of 80,000 iterations: (lr0 - floor)(1 - t/T)^0.9 + floor."""
    words = "SOLVER.LR_SCHEDULER_NAME PolyLRWithFloor SOLVER.BASE_LR 0.01 SOLVER.POLY_LR_END 0.01 SOLVER.MAX_ITER 80000"
    schedule = WarmupPoly.from_config(load_config(None, words.split()))
    for iteration in (0, 1, 40_000, 79_999):
        expected = (0.01 - 1e-4) * (1 - iteration / 80_000) ** 0.9 + 1e-4
        assert schedule(iteration) == pytest.approx(expected, rel=1e-12)
    assert schedule(80_000) == pytest.approx(1e-4)
    with pytest.raises(ValueError, match=r"LR_SCHEDULER_NAME 'Poly': expected one of WarmupPolyLR, PolyLRWithFloor"):
        WarmupPoly(0.1, 10, name="Poly")


@given(st.integers(1, 1000), st.integers(0, 3000), st.floats(0, 1), st.floats(0.1, 3))
def test_never_leaves_its_range(max_iter: int, iteration: int, end: float, power: float) -> None:
    factor = poly_factor(iteration, max_iter, power, end)
    assert end <= factor <= 1
    if iteration >= max_iter:
        # Upstream raised "math domain error" here after a longer MAX_ITER.
        assert factor == end


def test_unknown_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match=r"WARMUP_METHOD 'cosine'.*linear, constant"):
        WarmupPoly(1.0, 10, warmup_iters=3, warmup_method="cosine")(0)


def test_two_stages_equal_the_published_rule() -> None:
    """EoMT: heads warm up for 500 iterations while the backbone stands still, then the backbone for 1000; poly 0.9."""
    ours = WarmupPoly(1e-4, 10000, warmup_iters=500, warmup_start=0.0, backbone_warmup_iters=1000)
    for iteration in range(0, 10000, 50):
        heads = iteration / 500 if iteration < 500 else (1 - (iteration - 500) / 9500) ** 0.9
        since = iteration - 500
        backbone = 0.0 if since < 0 else since / 1000 if since < 1000 else (1 - (since - 1000) / 8500) ** 0.9
        assert ours(iteration) == pytest.approx(1e-4 * heads)
        assert ours.backbone(iteration) == pytest.approx(1e-4 * backbone)


def test_without_a_second_stage_the_backbone_follows() -> None:
    ours = WarmupPoly(1e-3, 100, warmup_iters=10)
    assert all(ours.backbone(i) == ours(i) for i in range(100))
