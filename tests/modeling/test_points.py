"""Point sampling against per-point loops in float64 and against grid_sample."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close

from the_mask.modeling.mask import points as P


def bilinear_loop(grid: torch.Tensor, x: float, y: float) -> float:
    """Value of one map [h, w] at one point, written out."""
    height, width = grid.shape
    px, py = x * width - 0.5, y * height - 0.5
    total = 0.0
    for row in (math.floor(py), math.floor(py) + 1):
        for column in (math.floor(px), math.floor(px) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(px - column)) * (1 - abs(py - row)) * float(grid[row, column])
    return total


def shared(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """All blocks of shared_point_blocks, channels first."""
    blocks = list(P.shared_point_blocks(maps, points))
    assert [i for rows, _ in blocks for i in range(len(points))[rows]] == list(range(len(points)))
    return torch.cat([values for _, values in blocks]).t()


def uniform(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Candidates as importance_points draws them."""
    return (torch.empty(*shape).uniform_(-1, 1, generator=generator) + 1) / 2


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def some_points(count: int, seed: int) -> torch.Tensor:
    points = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed))
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 0.5], [1 - 2**-24, 0.25]])
    return torch.cat([points, corners])


@settings(max_examples=40, deadline=None)
@given(size=SIZES, channels=st.integers(1, 4), seed=st.integers(0, 1000))
def test_all_samplers_equal_the_loop(size, channels, seed):
    maps = torch.randn(channels, *size, generator=torch.Generator().manual_seed(seed)) * 3
    points = some_points(12, seed)
    expected = torch.tensor([[bilinear_loop(m.double(), *p) for p in points.double().tolist()] for m in maps])
    got = P.point_sample(maps[None], points[None])[0]
    assert_close(got, expected, "layer")
    assert_close(shared(maps, points), expected, "layer")
    # A transposed, non-contiguous map of lower precision.
    view = maps.transpose(1, 2)
    flipped = points.flip(1)
    assert_close(shared(view, flipped), expected, "layer")


@settings(max_examples=40, deadline=None)
@given(size=SIZES, values=st.integers(1, 5), seed=st.integers(0, 1000), small=st.booleans())
def test_index_sample_equals_sampling_one_hot_maps(size, values, seed, small):
    index = torch.randint(values, size, generator=torch.Generator().manual_seed(seed))
    points = some_points(12, seed)
    one_hot = F.one_hot(index, values).permute(2, 0, 1).float()
    expected = P.point_sample(one_hot[None], points[None])[0].t()
    index = index.to(torch.uint8 if small else torch.int16)
    assert_close(P.shared_index_sample(index, points, values), expected, "sample")


def test_corner_weights_inside_sum_to_one():
    points = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    index, weight = P.bilinear_corners(points, 10, 20)
    assert index.min() >= 0
    assert index.max() < 200
    torch.testing.assert_close(weight.sum(-1), torch.ones(500))


def test_samplers_take_empty_input():
    assert list(P.shared_point_blocks(torch.zeros(2, 3, 3), torch.rand(0, 2))) == []
    empty = P.importance_points(torch.zeros(0, 3, 3), 8, 3.0, 0.75, torch.Generator())
    assert empty.shape == (0, 8, 2)


def test_point_sample_has_gradients():
    maps = torch.randn(2, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    points = torch.rand(2, 6, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: P.point_sample(m, points), maps)


def test_importance_points_follow_the_definition():
    """The same draws, sorted in full: the most uncertain candidates, then the fresh points."""
    maps = torch.randn(5, 7, 9, generator=torch.Generator().manual_seed(0)) * 4
    got = P.importance_points(maps, 40, 3.0, 0.75, P.point_generator(7, 1))
    generator = P.point_generator(7, 1)
    candidates = uniform(generator, 5, 120, 2)
    fresh = torch.rand(5, 10, 2, generator=generator)
    for m in range(5):
        logits = torch.tensor([bilinear_loop(maps[m].double(), *p) for p in candidates[m].double().tolist()])
        chosen = candidates[m][logits.abs().argsort()[:30]]
        assert {tuple(p) for p in got[m, :30].tolist()} == {tuple(p) for p in chosen.tolist()}
        assert torch.equal(got[m, 30:], fresh[m])


def test_importance_points_with_transformers():
    """Hugging Face's sampler with the same draws keeps the same points."""
    module = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    maps = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    got = P.importance_points(maps, 20, 3.0, 0.75, P.point_generator(1, 1))
    generator = P.point_generator(1, 1)
    draws = [uniform(generator, 3, 60, 2), torch.rand(3, 5, 2, generator=generator)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *a, **k: draws.pop(0))
        loss = module.Mask2FormerLoss.__new__(module.Mask2FormerLoss)
        expected = loss.sample_points_using_uncertainty(maps[:, None], lambda x: -x.abs(), 20, 3.0, 0.75)
    for m in range(3):
        assert {tuple(p) for p in got[m].tolist()} == {tuple(p) for p in expected[m].tolist()}


@pytest.mark.parametrize(("ratio", "uncertain"), [(0.0, 0), (1.0, 16)])
def test_importance_ratio_extremes(ratio, uncertain):
    maps = torch.randn(2, 6, 6)
    got = P.importance_points(maps, 16, 1.0, ratio, P.point_generator(0, 0))
    assert got.shape == (2, 16, 2)
    generator = P.point_generator(0, 0)
    candidates = uniform(generator, 2, 16, 2)
    fresh = torch.rand(2, 16 - uncertain, 2, generator=generator)
    expected = candidates if uncertain else fresh
    assert torch.equal(got.sort(1).values, expected.sort(1).values)


def test_importance_points_are_bounded_in_memory(monkeypatch):
    """Maps are handled a few at a time; every map still gets the points of its own logits."""
    monkeypatch.setitem(P._CANDIDATES_PER_CHUNK, "cpu", 60)
    maps = torch.zeros(5, 1, 2)
    maps[:, 0, 1] = torch.tensor([10.0, -10.0, 10.0, -10.0, 10.0])
    maps[:, 0, 0] = torch.tensor([0.0, 0.0, 10.0, 0.0, -10.0])
    drawn = []
    original = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: drawn.append(a[0]) or original(*a, **k))
    points = P.importance_points(maps, 10, 3.0, 1.0, P.point_generator(5, 0))
    assert max(drawn) == 2
    assert points.shape == (5, 10, 2)
    kept = P.point_sample(maps[:, None], points).abs().mean((1, 2))
    usual = P.point_sample(maps[:, None], original(5, 2000, 2)).abs().mean((1, 2))
    assert (kept < usual).all()


def test_ignored_candidates_are_taken_last():
    ignored = torch.zeros(8, 8, dtype=torch.bool)
    ignored[:, 2:] = True
    maps = torch.zeros(3, 4, 4)  # every point equally uncertain
    got = P.importance_points(maps, 100, 4.0, 0.5, P.point_generator(0, 0), ignored)
    # A quarter of the 400 candidates lie left of the border; nearly all of the 50 kept ones must.
    assert (got[:, :50, 0] < 0.32).all()
    everything = P.importance_points(maps, 100, 4.0, 0.5, P.point_generator(0, 0), torch.ones(8, 8, dtype=torch.bool))
    assert everything.isfinite().all()


def test_kept_candidates_touch_a_pixel_that_counts():
    """Against the four pixels around each kept point, while enough candidates have such a pixel."""
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        ignored = torch.rand(6, 7, generator=generator) < 0.8
        ignored[0, 0] = False
        points = P.point_generator(number, 0)
        touching = lambda xy, ignored=ignored: sum(  # noqa: E731
            not all(
                ignored[min(max(row, 0), 5), min(max(column, 0), 6)]
                for row in (math.floor(y * 6 - 0.5), math.floor(y * 6 + 0.5))
                for column in (math.floor(x * 7 - 0.5), math.floor(x * 7 + 0.5))
            )
            for x, y in xy.tolist()
        )
        candidates = torch.empty(1, 200, 2).uniform_(-1, 1, generator=P.point_generator(number, 0))
        kept = P.importance_points(torch.zeros(1, 4, 4), 50, 4.0, 1.0, points, ignored)[0]
        assert touching(kept) == min(50, touching((candidates[0] + 1) / 2))


def test_nan_logits_still_give_points():
    maps = torch.full((2, 4, 4), float("nan"))
    points = P.importance_points(maps, 12, 3.0, 0.75, P.point_generator(0, 0))
    assert points.shape == (2, 12, 2)
    assert ((points >= 0) & (points <= 1)).all()


def test_generators_depend_on_seed_and_stream_only():
    draw = lambda seed, stream: torch.rand(4, generator=P.point_generator(seed, stream)).tolist()  # noqa: E731
    assert draw(3, 1) == draw(3, 1)
    seen = {tuple(draw(seed, stream)) for seed in (0, 1, 2, 2**31, 2**63) for stream in range(4)}
    assert len(seen) == 20
    with pytest.raises(ValueError, match="must be >= 0"):
        P.point_generator(-1, 0)


@pytest.mark.parametrize("bad", [(0, 3.0, 0.75), (8, 0.5, 0.75), (8, 3.0, 1.5), (8, 3.0, -0.1)])
def test_bad_ratios_are_refused(bad):
    with pytest.raises(ValueError, match="point sampling needs"):
        P.importance_points(torch.zeros(1, 4, 4), *bad, torch.Generator())
