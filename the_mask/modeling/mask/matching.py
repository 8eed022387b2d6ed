"""Hungarian matching of queries to targets, in one or more rounds.

Axes: Q queries, N targets, T frames. Round one is Mask2Former's; THE-Mask's second round gives each target one more
query among those that are left (spec: "two-round hierarchical matching").

Where queries are carried from frame to frame, a target is matched in the first frame of the clip that shows it, among
the queries that are still free, and keeps its query (VidEoMT): that is ``order``, the number of each target's first
frame, with each column of the cost taken in that frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

# One round: (query_idx, target_idx), int64 CPU tensors of one length, sorted by target.
Pairs = tuple[Tensor, Tensor]

# Larger than any real cost, but small enough that sums stay accurate in float64.
_WORST_COST = 1e10


def assign(
    cost: Tensor | np.ndarray,
    rounds: int = 2,
    later_cost: Tensor | np.ndarray | None = None,
    order: Sequence[int] | None = None,
) -> list[Pairs]:
    """Assign queries to targets, each round an optimal one-to-one assignment of the queries that are still free.

    Rows of assigned queries are dropped from the matrix and the indices mapped back. A round makes
    min(N, free queries) pairs, so with ``rounds * N > Q`` the last rounds are short or empty. Non-finite costs count as
    the worst (NaN, +inf) or best (-inf) there is.

    Args:
        cost: [Q, N].
        rounds: number of rounds, >= 1.
        later_cost: [Q, N], the cost of every round after the first; default ``cost``.
        order: [N], the turn of each target: within a round, targets with the same number are assigned together, lower
            numbers first, and keep their queries. None: all together.

    Returns:
        One pair (query_idx, target_idx) of int64 CPU tensors per round, sorted by target.

    Raises:
        ValueError: ``rounds < 1``, a cost that is not a matrix, two costs of different shape, or an ``order`` of
            another length.
    """
    # Only training matches; scipy.optimize adds a fifth of a second to the start of every program that predicts.
    from scipy.optimize import linear_sum_assignment

    if rounds < 1:
        raise ValueError(f"rounds of matching must be >= 1, got {rounds}")
    first = _finite(cost)
    later = first if later_cost is None else _finite(later_cost)
    if first.ndim != 2 or first.shape != later.shape:
        raise ValueError(f"costs must be one [Q, N] shape, got {first.shape} and {later.shape}")
    turns = np.zeros(first.shape[1], dtype=np.int64) if order is None else np.asarray(order, dtype=np.int64)
    if turns.shape != first.shape[1:]:
        raise ValueError(f"order has {turns.size} numbers for {first.shape[1]} targets")
    groups = [np.flatnonzero(turns == turn) for turn in np.unique(turns)]
    free = np.arange(first.shape[0])
    result = []
    for r in range(rounds):
        matrix = first if r == 0 else later
        query_of: dict[int, int] = {}
        for columns in groups:
            rows, found = linear_sum_assignment(matrix[np.ix_(free, columns)])
            query_of |= zip(columns[found].tolist(), free[rows].tolist(), strict=True)
            free = np.delete(free, rows)
        targets = sorted(query_of)
        queries = [query_of[target] for target in targets]
        result.append((torch.tensor(queries, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)))
    return result


def first_frames(present: Sequence[Sequence[bool]] | Tensor, frames: Sequence[int]) -> list[int]:
    """For each target, the first of some frames that shows it.

    Args:
        present: [T, N], whether target n is in frame t.
        frames: numbers of the frames that count, rising.

    Returns:
        [N]; the last of the frames for a target that is in none of them.
    """
    shown = torch.as_tensor(present, dtype=torch.bool)
    return [next((t for t in frames if shown[t, n]), frames[-1]) for n in range(shown.shape[1])]


def _finite(cost: Tensor | np.ndarray) -> np.ndarray:
    """Float64 matrix with every entry within +-_WORST_COST."""
    matrix = cost.detach().cpu().double().numpy() if isinstance(cost, Tensor) else np.asarray(cost, dtype=np.float64)
    return np.clip(np.nan_to_num(matrix, nan=_WORST_COST), -_WORST_COST, _WORST_COST)


def match_all(
    costs: Sequence[Tensor],
    rounds: int,
    later_costs: Sequence[Tensor] | None = None,
    names: Sequence[str] | None = None,
    on_nonfinite: Callable[[str], None] | None = None,
    orders: Sequence[Sequence[int]] | None = None,
) -> list[list[Pairs]]:
    """`assign` for many matrices (all prediction sets and clips of a step) after one device-to-host copy.

    Args:
        costs: matrices [Q, N], N may differ.
        rounds: as in `assign`.
        later_costs: one per cost, or None.
        names: what each matrix belongs to, for messages.
        on_nonfinite: called with a message for each matrix with NaN or infinite entries; the matching goes on.
        orders: one ``order`` per cost, or None.

    Returns:
        The rounds of each matrix.
    """
    blocks = [c.detach() for c in costs]
    if later_costs is not None and rounds > 1:
        blocks += [c.detach() for c in later_costs]
    if not blocks:
        return []
    flat = torch.cat([b.reshape(-1) for b in blocks]).float().cpu().numpy()
    ends = np.cumsum([b.numel() for b in blocks])
    host = [flat[end - b.numel() : end].reshape(b.shape) for b, end in zip(blocks, ends, strict=True)]
    result = []
    for i in range(len(costs)):
        later = host[len(costs) + i] if len(host) > len(costs) else None
        bad = int((~np.isfinite(host[i])).sum())
        if bad and on_nonfinite is not None:
            where = names[i] if names is not None else f"cost matrix {i}"
            on_nonfinite(f"{where}: {bad} of {host[i].size} matching costs are NaN or infinite")
        result.append(assign(host[i], rounds, later, None if orders is None else orders[i]))
    return result
