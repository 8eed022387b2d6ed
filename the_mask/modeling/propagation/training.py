"""Training of a propagator on clips: unrolling, and the losses of the last frame.

Axes: B clips, K classes, h w cells of the working grid, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.modeling.freezing import evaluation_mode
from the_mask.modeling.propagation.propagators import Propagated, Propagator


def draw_distance(distances: Sequence[int], iteration: int) -> int:
    """Draw one of the distances uniformly; the same in all processes, and after a resume."""
    return int(distances[int(np.random.default_rng([iteration, 7]).integers(len(distances)))])


def unroll(propagator: Propagator, scores: Tensor, frames: Sequence[Tensor], differentiated: int = 2) -> Propagated:
    """Propagate from a keyframe to the last frame of a clip.

    Args:
        propagator: in training mode.
        scores: [B, K, h, w] of ``frames[0]``.
        frames: normalised small frames [B, 3, h, w], keyframe first, at least two.
        differentiated: last steps that gradients flow through; the ones before run without gradients and in eval mode,
            but for the flow network, whose batch norms keep learning (released code). 0 differentiates all steps.

    Returns:
        The result of the last step.
    """
    steps = len(frames) - 1
    if steps < 1:
        raise ValueError("a keyframe alone leaves nothing to propagate: clips need at least two frames")
    first = steps - differentiated if differentiated else 0
    result = None
    for step in range(steps):
        args = (scores, frames[step + 1], frames[step])
        if step < first:
            with torch.no_grad(), _only_flow_learns(propagator):
                result = propagator(*args)
        else:
            result = propagator(*args)
        scores = result.scores
    assert result is not None
    return result


@contextmanager
def _only_flow_learns(propagator: Propagator) -> Iterator[None]:
    with evaluation_mode(propagator):
        flow = getattr(propagator, "flow", None)
        if isinstance(flow, nn.Module):
            flow.train()
        yield


def upsample(scores: Tensor, size: tuple[int, int], stride: int, align_corners: bool) -> Tensor:
    """Upsample a grid [B, K, h, w] bilinearly to frames [B, K, H, W]; see ``geometry``."""
    if align_corners:
        return F.interpolate(scores, size=size, mode="bilinear", align_corners=True)
    covered = (scores.shape[-2] * stride, scores.shape[-1] * stride)
    full = F.interpolate(scores, size=covered, mode="bilinear", align_corners=False)
    return full[..., : size[0], : size[1]]


def segmentation_loss(logits: Tensor, labels: Tensor, ignore_label: int, class_weights: Tensor | None) -> Tensor:
    """Cross-entropy over the labelled pixels, weighted mean over classes; 0 without any.

    Args:
        logits: [B, K, H, W]. labels: int64 [B, H, W]. class_weights: [K] or None.
    """
    loss = F.cross_entropy(logits.float(), labels, class_weights, ignore_index=ignore_label, reduction="sum")
    valid = labels != ignore_label
    total = valid.sum() if class_weights is None else class_weights[labels[valid]].sum()
    return loss / total.clamp(min=1e-6)


def distillation_loss(scores: Tensor, teacher: Tensor) -> Tensor:
    """Mean over B, K, h, w of the terms of KL(softmax(teacher) || softmax(scores)) (released code), on the grid."""
    target = teacher.float().log_softmax(dim=1)
    terms = F.kl_div(scores.float().log_softmax(dim=1), target, reduction="none", log_target=True)
    return terms.mean()
