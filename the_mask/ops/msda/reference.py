"""Reference (oracle) and portable path of multi-scale deformable attention.

Axes: ``N`` batch, ``S`` positions of all levels, ``M`` heads, ``D`` channels per head, ``Q`` queries, ``L`` levels,
``P`` points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from the_mask.ops.sampling import gather_bilinear, grid_sample_bilinear, weighted_bilinear_backward


def ms_deform_attn_reference(
    value: Tensor, levels: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The definition, by explicit gathers of the corners in the dtype of the arguments (in float64, the oracle).

    Position in pixels of level l: ``x * W_l - 0.5``, ``y * H_l - 0.5``; output: the sum over levels and points of
    attention weight times bilinear sample (Deformable DETR, eq. 3).

    Args:
        value: [N, S, M, D].
        levels: L pairs (H, W).
        sampling_locations: [N, Q, M, L, P, 2], (x, y), 0..1 = image edges.
        attention_weights: [N, Q, M, L, P].

    Returns:
        [N, Q, M*D].
    """
    batch, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    output = value.new_zeros(batch * heads, queries, channels)
    start = 0
    for level, (height, width) in enumerate(levels):
        image = value[:, start : start + height * width]
        image = image.transpose(1, 2).reshape(batch * heads, height * width, channels)
        start += height * width
        place = sampling_locations[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries * points, 2)
        x, y = place[..., 0] * width - 0.5, place[..., 1] * height - 0.5
        sample = gather_bilinear(image, x, y, height, width).view(batch * heads, queries, points, channels)
        weight = attention_weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 1)
        output = output + (sample * weight).sum(2)
    return output.view(batch, heads, queries, channels).transpose(1, 2).reshape(batch, queries, heads * channels)


def ms_deform_attn_portable(
    value: Tensor, levels: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The same with one ``grid_sample`` per level; only standard operators, for every exporter and device."""
    batch, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    # (N*M, Q, L, P, ...): one image per head.
    place = sampling_locations.transpose(1, 2).reshape(batch * heads, queries, len(levels), points, 2)
    weight = attention_weights.transpose(1, 2).reshape(batch * heads, 1, queries, len(levels), points)
    output = None
    start = 0
    for level, (height, width) in enumerate(levels):
        image = value[:, start : start + height * width].permute(0, 2, 3, 1)
        image = image.reshape(batch * heads, channels, height, width)
        start += height * width
        x, y = place[:, :, level, :, 0] * width - 0.5, place[:, :, level, :, 1] * height - 0.5
        part = (grid_sample_bilinear(image, x, y) * weight[:, :, :, level]).sum(-1)
        output = part if output is None else output + part
    assert output is not None
    return output.view(batch, heads * channels, queries).transpose(1, 2)


def ms_deform_attn_python_backward(
    grad_output: Tensor,
    value: Tensor,
    levels: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, sampling_locations and attention_weights by explicit formulas, in the dtype of ``value``.

    Used by the registered operator without a kernel, because no autograd graph can be built inside an operator.
    """
    batch, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    grad = grad_output.view(batch, queries, heads, channels).transpose(1, 2).reshape(-1, queries, channels)
    grad_value = torch.empty_like(value)
    grad_locations, grad_weights = torch.empty_like(sampling_locations), torch.empty_like(attention_weights)
    start = 0
    for level, (height, width) in enumerate(levels):
        here = slice(start, start + height * width)
        start += height * width
        image = value[:, here].transpose(1, 2).reshape(batch * heads, height * width, channels)
        place = sampling_locations[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2)
        weight = attention_weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points)
        x, y = place[..., 0] * width - 0.5, place[..., 1] * height - 0.5
        grads = weighted_bilinear_backward(image, x, y, weight, grad, height, width)
        grad_value[:, here] = grads[0].view(batch, heads, height * width, channels).transpose(1, 2)
        moved = torch.stack((grads[1] * width, grads[2] * height), dim=-1)
        grad_locations[:, :, :, level] = moved.view(batch, heads, queries, points, 2).transpose(1, 2)
        grad_weights[:, :, :, level] = grads[3].view(batch, heads, queries, points).transpose(1, 2)
    return grad_value, grad_locations, grad_weights
