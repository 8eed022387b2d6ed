"""Select the matched masks from the predictions.

Axes: S prediction sets, B clips, T frames, Q queries, M maps, h w mask size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from the_mask.modeling.mask.matching import Pairs


class MapGroup(NamedTuple):
    """Matched maps of one round, one clip and one frame: consecutive rows, ordered by (target, prediction set)."""

    later: bool
    clip: int
    frame: int
    sets: list[int]
    targets: list[int]


def gather_maps(
    sets: Sequence[Mapping[str, Any]],
    matches: list[list[list[Pairs]]],
    supervised: Sequence[Sequence[int]],
    present: Sequence[Sequence[Sequence[bool]]] | None = None,
) -> tuple[list[MapGroup], Tensor]:
    """The matched maps of all sets, rounds, clips and supervised frames, in float32.

    ``present`` (per clip, frame and target) leaves out the frames that do not show a target.

    There is one indexing operation per prediction set, whatever the number of rounds: its gradient is a dense zero
    tensor with the few matched maps filled in, and a second such tensor would cost more than the secondary loss.

    Returns:
        The groups, and maps [M, h, w] in the groups' order.
    """
    entries = [
        (r > 0, b, t, n, s, q)
        for s, per_clip in enumerate(matches)
        for b, rounds in enumerate(per_clip)
        for r, (queries, indices) in enumerate(rounds)
        for q, n in zip(queries.tolist(), indices.tolist(), strict=True)
        for t in supervised[b]
        if present is None or present[b][t][n]
    ]
    entries.sort()
    groups: list[MapGroup] = []
    for later, b, t, n, s, _ in entries:
        if not groups or groups[-1][:3] != (later, b, t):
            groups.append(MapGroup(later, b, t, [], []))
        groups[-1].sets.append(s)
        groups[-1].targets.append(n)

    _, num_queries, num_frames = sets[0]["pred_masks"].shape[:3]
    device = sets[0]["pred_masks"].device
    by_set = sorted(range(len(entries)), key=lambda i: entries[i][4])
    rows = [(b * num_frames + t) * num_queries + q for _, b, t, _, _, q in (entries[i] for i in by_set)]
    position = torch.empty(len(entries), dtype=torch.long)
    position[by_set] = torch.arange(len(entries))
    lengths = [sum(e[4] == s for e in entries) for s in range(len(sets))]
    chosen = torch.tensor(rows, dtype=torch.long).to(device).split(lengths)
    # The decoders give views of [B, T, Q, h, w] tensors, which this order flattens without a copy.
    stacked = [s["pred_masks"].transpose(1, 2).flatten(0, 2) for s in sets]
    parts = [maps.index_select(0, index) for maps, index in zip(stacked, chosen, strict=True)]
    return groups, torch.cat(parts).index_select(0, position.to(device)).float()
