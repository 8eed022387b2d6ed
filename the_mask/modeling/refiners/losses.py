"""Losses of CascadePSP. Axes: B crops, H W crop size. Source: CascadePSP, section 3.2, weights of the released code."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

# Output of the cascade: weight of the cross-entropy, and of each of L1 and L2.
WEIGHTS = {
    "out": (0.0, 1.0),
    "a8": (1.0, 0.0),
    "b4": (0.5, 0.25),
    "b8": (1.0, 0.0),
    "c8": (1.0, 0.0),
    "c4": (0.5, 0.25),
}
GRADIENT_WEIGHT = 5.0
EPSILON = 1e-4


def cascade_losses(outputs: Mapping[str, Tensor], truth: Tensor) -> dict[str, Tensor]:
    """Weighted losses of every output, and an edge loss of the last one.

    Args:
        outputs: logits [B, 1, H, W] by name, of :class:`CascadePSP`.
        truth: 0 or 1, float [B, 1, H, W].

    Returns:
        ``loss_<output>`` and ``loss_gradient``, to be summed.
    """
    losses = {}
    for name, (entropy, distance) in WEIGHTS.items():
        logits = outputs[name]
        terms = torch.zeros((), device=logits.device)
        if entropy:
            terms = terms + entropy * F.binary_cross_entropy_with_logits(logits, truth)
        if distance:
            probabilities = logits.sigmoid()
            terms = terms + distance * (F.l1_loss(probabilities, truth) + F.mse_loss(probabilities, truth))
        losses[f"loss_{name}"] = terms
    edges = F.l1_loss(sobel_magnitude(outputs["out"].sigmoid()), sobel_magnitude(truth))
    losses["loss_gradient"] = GRADIENT_WEIGHT * edges
    return losses


def sobel_magnitude(x: Tensor) -> Tensor:
    """Length of the Sobel gradient (kernels divided by 4) of a 3x3 mean, [B, 1, H, W]; the border repeats."""
    kernel = x.new_tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]) / 4
    kernels = torch.stack([kernel, kernel.t()])[:, None]
    mean = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    gradient = F.conv2d(F.pad(mean, (1, 1, 1, 1), mode="replicate"), kernels)
    return (gradient.square().sum(dim=1, keepdim=True) + EPSILON).sqrt()
