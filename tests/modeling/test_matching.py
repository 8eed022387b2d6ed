"""Matching against brute force over all assignments and against SciPy."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from the_mask.modeling.mask.matching import assign, first_frames, match_all


def best_total(cost: np.ndarray) -> float:
    """Smallest sum of a one-to-one assignment with min(Q, N) pairs, by trying them all."""
    if cost.shape[0] < cost.shape[1]:
        cost = cost.T
    rows, columns = cost.shape
    return min(sum(cost[p[j], j] for j in range(columns)) for p in itertools.permutations(range(rows), columns))


@st.composite
def matrices(draw):
    q, n = draw(st.integers(1, 6)), draw(st.integers(0, 4))
    values = st.one_of(st.integers(-3, 3), st.floats(-50, 50, width=32))
    return np.array(draw(st.lists(values, min_size=q * n, max_size=q * n)), dtype=np.float64).reshape(q, n)


@settings(max_examples=150, deadline=None)
@given(cost=matrices(), rounds=st.integers(1, 4), seed=st.integers(0, 99), other=st.booleans())
def test_every_round_is_optimal_on_the_queries_left(cost, rounds, seed, other):
    later = np.random.default_rng(seed).normal(size=cost.shape) if other else None
    result = assign(cost, rounds, later)
    num_queries, num_targets = cost.shape
    assert len(result) == rounds
    free = set(range(num_queries))
    for r, (queries, targets) in enumerate(result):
        assert queries.dtype == targets.dtype == torch.int64
        assert len(queries) == len(targets) == min(len(free), num_targets)
        assert len(set(targets.tolist())) == len(targets), "a target twice in one round"
        assert set(queries.tolist()) <= free, "a query in two rounds"
        matrix = cost if r == 0 or later is None else later
        chosen = sum(matrix[q, n] for q, n in zip(queries.tolist(), targets.tolist(), strict=True))
        assert chosen == pytest.approx(best_total(matrix[sorted(free)]), abs=1e-6)
        free -= set(queries.tolist())


@pytest.mark.parametrize("num_targets", [1, 8, 25, 50])
def test_two_rounds_equal_the_released_exclusion_cost(num_targets):
    """The released code overwrites used rows with a huge cost; where that works (2N <= Q) the result is the same."""
    cost = torch.randn(100, num_targets, generator=torch.Generator().manual_seed(num_targets)).double().numpy()
    first, second = assign(cost, 2)
    rows, columns = linear_sum_assignment(cost)
    assert dict(zip(rows, columns, strict=True)) == dict(zip(*(x.tolist() for x in first), strict=True))
    masked = cost.copy()
    masked[rows] = 1000 * abs(cost.max())
    rows, columns = linear_sum_assignment(masked)
    assert dict(zip(rows, columns, strict=True)) == dict(zip(*(x.tolist() for x in second), strict=True))


def test_pairs_are_sorted_by_target():
    ((queries, targets),) = assign(np.array([[0.0, 9.0], [9.0, 9.0], [9.0, 0.0]])[::-1], 1)
    assert targets.tolist() == [0, 1]
    assert queries.tolist() == [2, 0]


def test_more_targets_than_queries():
    first, second = assign(torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]]), 2)
    assert (first[0].tolist(), first[1].tolist()) == ([1, 0], [0, 1])
    assert len(second[0]) == len(second[1]) == 0
    lengths = [len(q) for q, _ in assign(np.random.default_rng(0).normal(size=(10, 4)), 4)]
    assert lengths == [4, 4, 2, 0]


def test_no_targets_and_no_queries():
    for shape in [(5, 0), (0, 3), (0, 0)]:
        for queries, targets in assign(torch.zeros(shape), 3):
            assert queries.numel() == targets.numel() == 0
            assert queries.dtype == torch.int64


def test_non_finite_costs_come_last():
    cost = torch.full((4, 2), float("nan"))
    cost[2] = torch.tensor([5.0, 4.0])
    cost[3] = torch.tensor([float("inf"), 1.0])
    ((queries, targets),) = assign(cost, 1)
    assert dict(zip(targets.tolist(), queries.tolist(), strict=True)) == {0: 2, 1: 3}
    for bad in (float("nan"), float("inf"), -float("inf"), 1e38):
        first, second = assign(torch.full((5, 2), bad), 2)
        assert len(set(first[0].tolist()) | set(second[0].tolist())) == 4


def test_arrays_tensors_and_layouts_agree():
    cost = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)).t()  # non-contiguous
    expected = assign(cost.numpy().copy(), 2)
    for variant in (cost, cost.contiguous(), cost.double(), cost.clone().requires_grad_()):
        for got, want in zip(assign(variant, 2), expected, strict=True):
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])
    assert len(assign(cost.bfloat16(), 2)) == 2


def test_input_is_not_changed():
    cost = np.array([[np.nan, 1.0], [2.0, 3.0]])
    before = cost.copy()
    assign(cost, 2)
    np.testing.assert_array_equal(cost, before)


@pytest.mark.parametrize("rounds", [0, -1])
def test_rounds_below_one_are_refused(rounds):
    with pytest.raises(ValueError, match="rounds of matching must be >= 1"):
        assign(torch.zeros(2, 2), rounds)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one \[Q, N\] shape"):
        assign(torch.zeros(2, 2), 2, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"one \[Q, N\] shape"):
        assign(torch.zeros(2), 1)


@pytest.mark.parametrize("with_later", [False, True])
def test_match_all_equals_assign_one_by_one_after_one_copy(monkeypatch, with_later):
    generator = torch.Generator().manual_seed(3)
    costs = [torch.randn(12, n, generator=generator) for n in (3, 0, 7, 12)]
    later = [torch.randn(12, n, generator=generator) for n in (3, 0, 7, 12)] if with_later else None
    copies = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or original(self))
    result = match_all(costs, 2, later)
    assert len(copies) == 1
    monkeypatch.undo()
    for i, cost in enumerate(costs):
        for got, want in zip(result[i], assign(cost, 2, later[i] if later else None), strict=True):
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])
    assert match_all([], 2) == []


def test_match_all_names_what_is_not_finite():
    messages = []
    costs = [torch.zeros(3, 2), torch.tensor([[float("nan"), 0.0], [0.0, float("inf")]])]
    result = match_all(costs, 1, names=["final of clip a", "aux 3 of clip b"], on_nonfinite=messages.append)
    assert messages == ["aux 3 of clip b: 2 of 4 matching costs are NaN or infinite"]
    assert len(result[1][0][0]) == 2


def in_order_by_brute_force(cost, order, rounds):
    """Every way to give each group of targets its queries, group after group; the best of each group is kept."""
    free, result = list(range(cost.shape[0])), []
    for _ in range(rounds):
        taken = {}
        for turn in sorted(set(order)):
            targets = [n for n, own in enumerate(order) if own == turn]
            number = min(len(free), len(targets))
            ways = [
                (sum(cost[q, n] for q, n in zip(queries, chosen, strict=True)), queries, chosen)
                for chosen in itertools.combinations(targets, number)
                for queries in itertools.permutations(free, number)
            ]
            _, queries, chosen = min(ways, key=lambda way: way[0])
            taken |= dict(zip(chosen, queries, strict=True))
            free = [q for q in free if q not in queries]
        result.append(taken)
    return result


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), q=st.integers(1, 6), n=st.integers(0, 4), rounds=st.integers(1, 3))
def test_targets_matched_in_order_keep_their_queries(seed, q, n, rounds):
    generator = np.random.default_rng(seed)
    cost, order = generator.normal(size=(q, n)), generator.integers(0, 3, n).tolist()
    found = [dict(zip(t.tolist(), q.tolist(), strict=True)) for q, t in assign(cost, rounds, order=order)]
    assert found == in_order_by_brute_force(cost, order, rounds)
    # One turn for all is the usual matching.
    alone = assign(cost, rounds, order=[7] * n)
    for pair, same in zip(alone, assign(cost, rounds), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, same, strict=True))


def test_order_of_another_length():
    with pytest.raises(ValueError, match="order has 2 numbers for 3 targets"):
        assign(np.zeros((4, 3)), 1, order=[0, 1])


def test_first_frames():
    present = [[False, True, False], [True, True, False], [True, False, False]]
    assert first_frames(present, [0, 1, 2]) == [1, 0, 2]
    # Frame 0 does not count; the last target is nowhere.
    assert first_frames(present, [1, 2]) == [1, 1, 2]
