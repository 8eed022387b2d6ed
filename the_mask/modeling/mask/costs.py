"""The matching cost of a clip's queries and targets, from sampled points of its supervised frames.

Axes: Q queries, N targets, K classes, T' frames that count, P points, h w mask size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from the_mask.modeling.mask import losses
from the_mask.modeling.mask.points import shared_point_blocks


class CostWeights(NamedTuple):
    """Weights of the parts of the cost."""

    of_class: float
    mask: float
    dice: float


def matching_cost(
    logits: Tensor,
    masks: Tensor,
    labels: Tensor,
    truths: Sequence[Tensor],
    skip_ignored: Sequence[bool],
    points: Tensor,
    frames: Sequence[int],
    firsts: Sequence[int],
    weights: CostWeights,
) -> tuple[Tensor, Tensor]:
    """Cost [Q, N] of one prediction set of a clip, and the binary cross-entropy in it alone.

    Args:
        logits: class logits [Q, K + 1], or per frame of the clip [T, Q, K + 1].
        masks: mask logits [Q, T, h, w].
        labels: classes of the targets [N].
        truths: per frame that counts [P, N + 1]: the targets, and last the ignored share, at the points.
        skip_ignored: per frame that counts, whether to leave out the ignored share.
        points: [P, 2], shared by queries, targets and frames.
        frames: numbers of the T' frames that count, rising.
        firsts: [N], the frame that each target's costs come from; empty: sums over all frames.
        weights: of the parts.
    """
    parts = []
    for t, truth, skip in zip(frames, truths, skip_ignored, strict=True):
        # Outside the map, the border pixel is repeated; normalising the share has that effect.
        valid = 1 - truth[:, -1] / truth.sum(1) if skip else None
        parts.append(_mask_sums(masks[:, t], truth[:, :-1], valid, points))
    if firsts:
        # Each target's column comes from its first frame.
        picked = [[n for n, first in enumerate(firsts) if first == t] for t in frames]
        columns = torch.tensor([n for group in picked for n in group], device=logits.device).argsort()
        bces = [losses.bce_cost(sums)[:, group] for sums, group in zip(parts, picked, strict=True)]
        dices = [losses.dice_cost(sums)[:, group] for sums, group in zip(parts, picked, strict=True)]
        bce, dice = torch.cat(bces, 1)[:, columns], torch.cat(dices, 1)[:, columns]
        class_logits = logits if logits.ndim == 2 else logits[list(firsts)]
    else:
        sums = parts[0]
        for part in parts[1:]:
            sums = sums.plus(part)
        bce, dice = losses.bce_cost(sums), losses.dice_cost(sums)
        class_logits = logits if logits.ndim == 2 else logits[list(frames)]
    cost = weights.of_class * _class_cost(class_logits, labels, bool(firsts)) + weights.mask * bce + weights.dice * dice
    return cost, bce


def _mask_sums(maps: Tensor, truth: Tensor, valid: Tensor | None, points: Tensor) -> losses.MaskSums:
    """Sums of masks [Q, h, w] with targets [P, N] at points [P, 2] of one frame; ``valid``: [P]."""
    sums: losses.MaskSums | None = None
    for rows, logits in shared_point_blocks(maps, points):
        part = losses.pairwise_mask_sums(logits.t(), truth[rows].t(), None if valid is None else valid[rows])
        sums = part if sums is None else sums.plus(part)
    assert sums is not None
    return sums


def _class_cost(logits: Tensor, labels: Tensor, of_targets: bool) -> Tensor:
    """Class cost [Q, N].

    Args:
        logits: [Q, K + 1]; or one per target [N, Q, K + 1] with ``of_targets``; or one per frame, which are averaged.
    """
    if logits.ndim == 2:
        return losses.class_cost(logits, labels)
    if of_targets:
        return torch.cat([losses.class_cost(own, labels[n : n + 1]) for n, own in enumerate(logits)], dim=1)
    return torch.stack([losses.class_cost(frame, labels) for frame in logits]).mean(0)
