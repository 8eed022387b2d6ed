"""Adaptive average pooling that can be exported with dynamic sizes. Axes: B images, C channels, h w sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def adaptive_average(x: Tensor, rows: int, columns: int) -> Tensor:
    """Means over ``rows`` x ``columns`` cells, [B, C, h, w] -> [B, C, rows, columns], as ``F.adaptive_avg_pool2d``.

    When exporting with dynamic sizes, it is computed as two matrix products, because ``torch.export`` and ONNX would
    fix the windows to those of the example's size.
    """
    height, width = x.shape[-2], x.shape[-1]
    sizes = (height, width, rows, columns)
    if not any(isinstance(size, torch.SymInt) for size in sizes):
        return F.adaptive_avg_pool2d(x, (rows, columns))
    return _cells(rows, height, x) @ x @ _cells(columns, width, x).t()


class AdaptiveAverage(nn.Module):
    """Module form of :func:`adaptive_average` over ``size`` x ``size`` cells."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return adaptive_average(x, self.size, self.size)

    def extra_repr(self) -> str:
        return str(self.size)


def square_columns(rows: int, height: int, width: int) -> int:
    """Number of columns that makes ``rows`` rows of cells of a map as square as its own: round(rows * width / height).

    At least 1; halves are rounded to even, as ``round`` does. Only integer arithmetic is used, so that dynamic sizes of
    an exported program work.
    """
    if isinstance(height, Tensor) or isinstance(width, Tensor):
        # Under jit tracing, which fvcore uses to count operations, sizes are tensors.
        height, width = int(height), int(width)
    doubled = 2 * rows * width + height
    quotient, rest = doubled // (2 * height), doubled % (2 * height)
    is_half = 1 - (rest + 2 * height - 1) // (2 * height)
    return torch.sym_max(1, quotient - is_half * (quotient % 2))  # type: ignore[return-value]  # SymInt acts as int


def _cells(cells: int, size: int, like: Tensor) -> Tensor:
    """[cells, size] weights of means over cells from floor(i * size / cells) to ceil((i + 1) * size / cells)."""
    index = torch.arange(cells, device=like.device)[:, None]
    place = torch.arange(size, device=like.device)
    first, end = index * size // cells, ((index + 1) * size + cells - 1) // cells
    inside = ((place >= first) & (place < end)).to(like.dtype)
    return inside / (end - first).to(like.dtype)
