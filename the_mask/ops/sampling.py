"""Bilinear sampling with zeros outside: the convention of all paths of the deformable operators.

A point (y, x) in pixels, with pixel centres at integers, is used only if ``-1 < y < H`` and ``-1 < x < W`` (strict).
Otherwise its value and all its gradients are zero. The comparison is false for NaN, so NaN contributes zero, and huge
values are never converted to integers. The derivative at an integer position is the right-sided one (floor).

Axes: ``N`` images, ``R`` rows of points, ``P`` points, ``D`` channels, ``H W`` size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def inside(x: Tensor, y: Tensor, height: int, width: int) -> Tensor:
    """Whether each point is inside; False for NaN."""
    return (x > -1) & (x < width) & (y > -1) & (y < height)


def gather_bilinear(image: Tensor, x: Tensor, y: Tensor, height: int, width: int) -> Tensor:
    """Sample by explicit gathers of the four corners; differentiable, exact in the dtype of the arguments.

    Args:
        image: [N, H*W, D].
        x, y: [N, P] positions in pixels.

    Returns:
        [N, P, D].
    """
    valid = inside(x, y, height, width)
    x, y = torch.where(valid, x, 0), torch.where(valid, y, 0)
    left, top = x.detach().floor(), y.detach().floor()
    right_part, bottom_part = x - left, y - top
    total = image.new_zeros(*x.shape, image.shape[-1])
    for down in (0, 1):
        for across in (0, 1):
            column, row = left.long() + across, top.long() + down
            known = valid & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            weight = (right_part if across else 1 - right_part) * (bottom_part if down else 1 - bottom_part)
            index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            corner = image.gather(1, index[..., None].expand(*index.shape, image.shape[-1]))
            # where() instead of a zero weight: the pixel read for a corner outside may be NaN or infinite.
            total = total + torch.where(known[..., None], corner, 0) * weight[..., None]
    return total


def grid_sample_bilinear(image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sample by ``grid_sample``, with the above check added.

    Values equal :func:`gather_bilinear` up to rounding. ``grid_sample`` needs normalised coordinates, whose rounding
    may move a position off an integer; within that rounding (about 1e-5 pixels in float32) the derivative may be the
    left-sided one.

    Args:
        image: [N, D, H, W].
        x, y: [N, R, P] positions in pixels.

    Returns:
        [N, D, R, P].
    """
    height, width = image.shape[-2:]
    valid = inside(x, y, height, width)
    # Two pixels outside: the value and its gradients are zero, and finite.
    x, y = torch.where(valid, x, -2), torch.where(valid, y, -2)
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def weighted_bilinear_backward(
    image: Tensor, x: Tensor, y: Tensor, weight: Tensor, grad: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``sum_p weight_p * sample_p`` by explicit formulas, without autograd.

    Args:
        image: [N, H*W, D].
        x, y, weight: [N, R, P].
        grad: [N, R, D], gradient of the sums.

    Returns:
        Gradients of ``image``, ``x``, ``y`` and ``weight``.
    """
    valid = inside(x, y, height, width)
    x, y = torch.where(valid, x, 0), torch.where(valid, y, 0)
    left, top = x.floor(), y.floor()
    right_part, bottom_part = x - left, y - top
    grad_image = torch.zeros_like(image)
    grad_x, grad_y, grad_weight = (torch.zeros_like(x) for _ in range(3))
    for down in (0, 1):
        for across in (0, 1):
            column, row = left.long() + across, top.long() + down
            known = valid & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            index = index.flatten(1)[..., None].expand(-1, -1, image.shape[-1])
            part_x = right_part if across else 1 - right_part
            part_y = bottom_part if down else 1 - bottom_part
            corner = image.gather(1, index).view(*x.shape, image.shape[-1])
            along = torch.where(known, (corner * grad[:, :, None]).sum(-1), 0)
            grad_weight += part_x * part_y * along
            grad_x += weight * part_y * (along if across else -along)
            grad_y += weight * part_x * (along if down else -along)
            share = torch.where(known, weight * part_x * part_y, 0)
            grad_image.scatter_add_(1, index, (share[..., None] * grad[:, :, None]).flatten(1, 2))
    return grad_image, grad_x, grad_y, grad_weight
