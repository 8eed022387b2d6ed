"""Costs of matching and losses of masks and classes, as pure functions in float32.

Axes: Q queries, N targets, K classes, M maps, P points (or pixels, or cells; every "point" may carry a weight). Mask
arguments are logits. ``valid`` is the weight of a point: 0 leaves it out, 1 counts it fully; a bilinear sample that is
partly ignored has the share of valid pixels. Targets never exceed ``valid``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-6


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.abs().sigmoid_().log_().neg_().add_(x.relu())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.sigmoid()


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) = relu(x) - log(sigmoid(|x|)), which a CPU does in an eighth of the time of ``F.softplus``."""
    softplus_of: Tensor = _Softplus.apply(x) if x.device.type == "cpu" else F.softplus(x)
    return softplus_of


class MaskSums(NamedTuple):
    """Sums over points, from which all pairwise mask costs are computed; sums over disjoint sets of points add up.

    Attributes:
        softplus: [Q], sum of valid * softplus(x).
        logit: [Q, N], sum of x * t.
        overlap: [Q, N], sum of sigmoid(x) * t.
        area: [Q], sum of valid * sigmoid(x).
        target: [N], sum of t.
        total: [], sum of valid.
    """

    softplus: Tensor
    logit: Tensor
    overlap: Tensor
    area: Tensor
    target: Tensor
    total: Tensor

    def plus(self, other: MaskSums) -> MaskSums:
        """Add the sums over another set of points."""
        return MaskSums(*(a + b for a, b in zip(self, other, strict=True)))


def pairwise_mask_sums(logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> MaskSums:
    """`MaskSums` of every query with every target.

    Everything pairwise is a matrix product; softplus and sigmoid are taken once per query and point:
    t * softplus(-x) + (v - t) * softplus(x) = v * softplus(x) - t * x.

    Args:
        logits: [Q, P].
        targets: [N, P] in 0..1.
        valid: [P] or None (all 1).
    """
    x, t = logits.float(), targets.float()
    v = x.new_ones(x.shape[1]) if valid is None else valid.float()
    # Point-major, so that the products read samples [P, Q] in memory order.
    samples, weights = x.t(), torch.cat([t, v[None]])
    overlap = (weights @ samples.sigmoid()).t()
    return MaskSums(
        softplus=v @ softplus(samples),
        logit=(weights[:-1] @ samples).t(),
        overlap=overlap[:, :-1],
        area=overlap[:, -1],
        target=t.sum(1),
        total=v.sum(),
    )


def bce_cost(sums: MaskSums) -> Tensor:
    """Mean binary cross-entropy over valid points, [Q, N]."""
    return (sums.softplus[:, None] - sums.logit) / sums.total.clamp(min=_TINY)


def dice_cost(sums: MaskSums) -> Tensor:
    """1 - (2 * overlap + 1) / (areas + 1), [Q, N] (V-Net dice with smoothing 1; released Mask2Former)."""
    return 1 - (2 * sums.overlap + 1) / (sums.area[:, None] + sums.target[None] + 1)


def class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the probability of each target's class.

    Args:
        logits: [Q, K + 1].
        labels: int64 [N].

    Returns:
        [Q, N].
    """
    return -logits.float().softmax(-1)[:, labels]


def mask_bce_loss(logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy over the valid points of each map.

    Args:
        logits: [M, P].
        targets: [M, P] in 0..1.
        valid: [M, P] weights, or None (all 1).

    Returns:
        [M]; 0 for a map without valid points.
    """
    logits = logits.float()
    if valid is None:
        return (softplus(logits) - targets * logits).mean(1)
    return (valid * softplus(logits) - targets * logits).sum(1) / valid.sum(1).clamp(min=_TINY)


def mask_dice_loss(logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Dice loss with smoothing 1 of each map; arguments as `mask_bce_loss`. Returns [M]."""
    probability = logits.float().sigmoid()
    overlap = (probability * targets).sum(1)
    area = probability.sum(1) if valid is None else (probability * valid).sum(1)
    return 1 - (2 * overlap + 1) / (area + targets.sum(1) + 1)


def pseudo_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Targets of the secondary loss: the ground truth where the prediction is foreground already (released code).

    Logits and targets have one shape; the targets may be counts. sigmoid(x) > 0.5 is x > 0. No gradient.
    """
    return targets * (logits.detach() > 0)


def classification_loss(logits: Tensor, classes: Tensor, weights: Tensor, normaliser: Tensor) -> Tensor:
    """Weighted cross-entropy: sum of weight * -log p over all queries, over ``normaliser``.

    Args:
        logits: [S, R, K + 1], S independent sets of R queries.
        classes: int64 [S, R], K is no-object.
        weights: [S, R]; 0 leaves a query out.
        normaliser: [S], usually the sum of the weights over all ranks.

    Returns:
        [S].
    """
    log_p = logits.float().log_softmax(-1).gather(-1, classes.unsqueeze(-1)).squeeze(-1)
    return -(weights * log_p).sum(1) / normaliser.clamp(min=_TINY)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Sum over ranks / number of ranks; the values themselves with one process.

    Gradients are averaged over ranks, so a loss divided by the mean of its normaliser is the loss of all ranks together
    divided by the sum.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()
