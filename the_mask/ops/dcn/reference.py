"""Reference (oracle) and portable path of DCNv3.

Axes: ``N`` batch, ``H W`` input size, ``Ho Wo`` output size, ``G`` groups, ``D`` channels per group, ``P`` points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from the_mask.ops.dcn.geometry import Geometry
from the_mask.ops.sampling import gather_bilinear, grid_sample_bilinear, weighted_bilinear_backward


def dcnv3_reference(
    x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, center_feature_scale: Tensor | None = None
) -> Tensor:
    """The definition, by explicit gathers of the corners in the dtype of the arguments (in float64, the oracle).

    Args:
        x: [N, H, W, G*D].
        offset: [N, Ho, Wo, G*P*2], (x, y) per point.
        mask: [N, Ho, Wo, G*P], after a softmax over P by the caller.
        center_feature_scale: [N, H, W, G] or None.

    Returns:
        [N, Ho, Wo, G*D].
    """
    batch, height, width, channels = x.shape
    groups, points = geometry.groups, geometry.points
    rows, columns = geometry.output_size(height, width)
    image = x.reshape(batch, height * width, groups, channels // groups).transpose(1, 2).flatten(0, 1)
    px, py = (
        place.flatten(1, 2).transpose(1, 2).reshape(batch * groups, rows * columns * points)
        for place in geometry.positions(offset, height, width)
    )
    sample = gather_bilinear(image, px, py, height, width)
    sample = sample.view(batch, groups, rows, columns, points, channels // groups)
    weight = mask.reshape(batch, rows, columns, groups, points, 1).permute(0, 3, 1, 2, 4, 5)
    output = (sample * weight).sum(4).permute(0, 2, 3, 1, 4).reshape(batch, rows, columns, channels)
    return blend_center(output, x, center_feature_scale)


def dcnv3_portable(
    x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, center_feature_scale: Tensor | None = None
) -> Tensor:
    """The same with one ``grid_sample``; only standard operators, so it works with every exporter and device."""
    batch, height, width, channels = x.shape
    groups, points = geometry.groups, geometry.points
    rows, columns = geometry.output_size(height, width)
    image = x.reshape(batch, height, width, groups, channels // groups).permute(0, 3, 4, 1, 2).flatten(0, 1)
    px, py = (
        place.permute(0, 3, 1, 2, 4).reshape(batch * groups, rows * columns, points)
        for place in geometry.positions(offset, height, width)
    )
    weight = mask.reshape(batch, rows * columns, groups, points).transpose(1, 2)
    weight = weight.reshape(batch * groups, 1, rows * columns, points)
    output = (grid_sample_bilinear(image, px, py) * weight).sum(-1)
    output = output.view(batch, channels, rows * columns).transpose(1, 2).reshape(batch, rows, columns, channels)
    return blend_center(output, x, center_feature_scale)


def blend_center(output: Tensor, x: Tensor, center_feature_scale: Tensor | None) -> Tensor:
    """``output * (1 - a) + x * a`` with one a per position and group ("centre-feature scale" of InternImage-H, -G)."""
    if center_feature_scale is None:
        return output
    share = center_feature_scale.repeat_interleave(x.shape[-1] // center_feature_scale.shape[-1], dim=-1)
    return output * (1 - share) + x * share


def dcnv3_python_backward(
    grad_output: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    geometry: Geometry,
    center_feature_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of x, offset, mask (and center_feature_scale) by explicit formulas, in the dtype of ``x``.

    Used by the registered operator without a kernel, because no autograd graph can be built inside an operator.
    """
    batch, height, width, channels = x.shape
    groups, points = geometry.groups, geometry.points
    per_group = channels // groups
    rows, columns = geometry.output_size(height, width)
    grad = grad_output
    if center_feature_scale is not None:
        share = center_feature_scale.repeat_interleave(per_group, dim=-1)
        grad = grad_output * (1 - share)
    image = x.reshape(batch, height * width, groups, per_group).transpose(1, 2).flatten(0, 1)
    px, py = (
        place.flatten(1, 2).transpose(1, 2).reshape(batch * groups, rows * columns, points)
        for place in geometry.positions(offset, height, width)
    )
    weight = mask.reshape(batch, rows * columns, groups, points).transpose(1, 2).flatten(0, 1)
    flat = grad.reshape(batch, rows * columns, groups, per_group).transpose(1, 2).flatten(0, 1)
    grads = weighted_bilinear_backward(image, px, py, weight, flat, height, width)
    grad_x = grads[0].view(batch, groups, height * width, per_group).transpose(1, 2).reshape(x.shape)
    moved = torch.stack(grads[1:3], dim=-1) * geometry.offset_scale
    grad_offset = moved.view(batch, groups, rows * columns, points * 2).transpose(1, 2).reshape(offset.shape)
    grad_mask = grads[3].view(batch, groups, rows * columns, points).transpose(1, 2).reshape(mask.shape)
    if center_feature_scale is None:
        return grad_x, grad_offset, grad_mask
    grad_x = grad_x + grad_output * share
    plain = dcnv3_reference(x, offset, mask, geometry)
    grad_share = (grad_output * (x - plain)).unflatten(-1, (groups, per_group)).sum(-1)
    return grad_x, grad_offset, grad_mask, grad_share
