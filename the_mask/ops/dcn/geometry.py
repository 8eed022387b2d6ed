"""Sampling positions of DCNv3: kernel geometry, output sizes, order of points.

Axes: ``N`` batch, ``Ho Wo`` output size, ``G`` groups, ``P`` points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from the_mask.ops.checks import to_pair


def _center(kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    # A function, because torch.compile in torch 2.9 cannot unpack a property of a named tuple.
    return (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)


class Geometry(NamedTuple):
    """Kernel geometry; pairs are (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    offset_scale: float
    remove_center: bool

    @property
    def points(self) -> int:
        """Number of points per group, P."""
        return self.kernel[0] * self.kernel[1] - int(self.remove_center)

    @property
    def center(self) -> tuple[int, int]:
        """Distance from the first tap to the centre of the kernel grid (rounded down; even kernels are allowed)."""
        return _center(self.kernel, self.dilation)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(Ho, Wo) for an input of that size."""
        sizes = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                (height, width), self.kernel, self.stride, self.padding, self.dilation
            )
        )
        return tuple(sizes)  # type: ignore[return-value]

    def taps(self) -> list[tuple[int, int]]:
        """(x, y) of each point relative to the kernel centre, before scaling; x is the outer loop (released code)."""
        center_y, center_x = _center(self.kernel, self.dilation)
        taps = [
            (column * self.dilation[1] - center_x, row * self.dilation[0] - center_y)
            for column in range(self.kernel[1])
            for row in range(self.kernel[0])
        ]
        if self.remove_center:
            del taps[len(taps) // 2]
        return taps

    def positions(self, offset: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """x and y of every point in pixels, each [N, Ho, Wo, G, P], in the dtype of ``offset`` [N, Ho, Wo, G*P*2]."""
        rows, columns = self.output_size(height, width)
        offset = offset.reshape(offset.shape[0], rows, columns, self.groups, self.points, 2)
        taps = torch.tensor(self.taps(), dtype=offset.dtype, device=offset.device)
        moved = self.offset_scale * (taps + offset)
        base_x = torch.arange(columns, dtype=offset.dtype, device=offset.device) * self.stride[1]
        base_y = torch.arange(rows, dtype=offset.dtype, device=offset.device) * self.stride[0]
        center_y, center_x = _center(self.kernel, self.dilation)
        base_x = base_x + (center_x - self.padding[1])
        base_y = base_y + (center_y - self.padding[0])
        return base_x[:, None, None] + moved[..., 0], base_y[:, None, None, None] + moved[..., 1]


def make_geometry(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
) -> Geometry:
    """Check the parameters and collect them.

    Raises:
        ValueError: a parameter out of range, named in the message.
    """
    kernel = to_pair("kernel_size", kernel_size, 1)
    if groups < 1:
        raise ValueError(f"groups={groups}: expected at least 1")
    if remove_center and (kernel[0] != kernel[1] or kernel[0] % 2 == 0 or kernel[0] == 1):
        raise ValueError(f"remove_center needs a square odd kernel_size above 1, not {kernel}")
    return Geometry(
        kernel,
        to_pair("stride", stride, 1),
        to_pair("padding", padding, 0),
        to_pair("dilation", dilation, 1),
        groups,
        float(offset_scale),
        bool(remove_center),
    )
