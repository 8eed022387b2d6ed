"""Positions of a coarse grid's cells on a frame, sampling of maps at them, and backward warping.

Axes: B maps, C channels, H W pixels, h w cells. A cell of stride ``s`` covers ``s`` x ``s`` pixels; the centre of pixel
``p`` is at ``p``, so the centre of cell ``i`` is at ``(i + 0.5) * s - 0.5``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]


def grid_size(size: Size, stride: int) -> Size:
    """(h, w) of the grid that covers a frame of ``size`` (H, W): rounded up."""
    return math.ceil(size[0] / stride), math.ceil(size[1] / stride)


def cell_centres(cells: int, stride: int, pixels: int, align_corners: bool, device: torch.device | None) -> Tensor:
    """Pixel positions [cells] of the cell centres along one axis, float64.

    Args:
        cells: number of cells, ``ceil(pixels / stride)``.
        stride: pixels per cell.
        pixels: length of the axis.
        align_corners: put the first and the last cell on the first and the last pixel, as the released GSVNet does.
        device: of the result.
    """
    index = torch.arange(cells, dtype=torch.float64, device=device)
    if align_corners:
        return index * ((pixels - 1) / max(cells - 1, 1))
    return (index + 0.5) * stride - 0.5


def read_at(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear values of a map at a grid of positions; positions outside take the border's value.

    Args:
        x: [..., h, w] of any dtype.
        rows, columns: positions [h'] and [w'] in cells of ``x``.

    Returns:
        [..., h', w'] of floating point (float32 from integers).
    """
    x = _read_axis(x, rows, -2)
    return _read_axis(x, columns, -1)


def _read_axis(x: Tensor, positions: Tensor, axis: int) -> Tensor:
    last = x.shape[axis] - 1
    positions = positions.clamp(0, last)
    low = positions.floor().long()
    before = x.index_select(axis, low)
    after = x.index_select(axis, (low + 1).clamp(max=last))
    if not before.is_floating_point():
        before, after = before.float(), after.float()
    fraction = (positions - low).to(before.dtype)
    return torch.lerp(before, after, fraction if axis == -1 else fraction[:, None])


def downscale_frames(frames: Tensor, stride: int, align_corners: bool = False) -> Tensor:
    """Frames [B, 3, H, W] of any dtype at the centres of the grid's cells: [B, 3, h, w] float, without antialiasing.

    Source: GSVNet feeds flow and intra network with bilinear frames at 1/8 (released code).
    """
    height, width = frames.shape[-2:]
    rows, columns = _centres((height, width), stride, align_corners, frames.device)
    return read_at(frames, rows, columns)


def to_grid(scores: Tensor, size: Size, stride: int, source_stride: float, scale: float = 1.0) -> Tensor:
    """Move a segmentor's map to the grid of another stride.

    Args:
        scores: [..., h', w'], cells of ``source_stride`` pixels of the segmentor's input.
        size: (H, W) of the frame.
        stride: of the result, in pixels of the frame.
        source_stride: of ``scores``, in pixels of the segmentor's input.
        scale: size of the segmentor's input over the frame's.

    Returns:
        [..., h, w]; with strides that divide, that of ``F.interpolate``.
    """
    rows, columns = _centres(size, stride, False, scores.device)
    pixels = [(positions + 0.5) * scale - 0.5 for positions in (rows, columns)]
    return read_at(scores, *[(positions + 0.5) / source_stride - 0.5 for positions in pixels])


def from_aligned_grid(scores: Tensor, size: Size, stride: int) -> Tensor:
    """Move a map of an ``align_corners`` grid to the plain grid of the same stride, which score maps use.

    Args:
        scores: [..., h, w].
        size: (H, W) of the frame.
        stride: pixels per cell.
    """
    rows, columns = _centres(size, stride, False, scores.device)
    (height, width), (h, w) = size, (scores.shape[-2], scores.shape[-1])
    return read_at(scores, rows * (h - 1) / max(height - 1, 1), columns * (w - 1) / max(width - 1, 1))


def _centres(size: Size, stride: int, align_corners: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    h, w = grid_size(size, stride)
    return (
        cell_centres(h, stride, size[0], align_corners, device),
        cell_centres(w, stride, size[1], align_corners, device),
    )


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """Backward warping: out(p) = x(p + flow(p)), bilinear; outside ``x`` the value is 0.

    Args:
        x: [B, C, h, w].
        flow: [B, 2, h, w] in cells; channel 0 is horizontal (right is positive), channel 1 vertical (down).

    Returns:
        [B, C, h, w] of the dtype of ``x``. Positions are computed in float32, also under autocast: bfloat16 spaces
        them half a cell apart. Source: GSVNet section 3.3.
    """
    h, w = x.shape[-2:]
    with torch.autocast(x.device.type, enabled=False):
        across = torch.arange(w, device=x.device, dtype=torch.float32)
        down = torch.arange(h, device=x.device, dtype=torch.float32)[:, None]
        field = flow.float()
        # The released code uses align_corners both here and in its grid, which gives the same positions.
        columns, rows = (field[:, 0] + across + 0.5) * (2 / w) - 1, (field[:, 1] + down + 0.5) * (2 / h) - 1
        grid = torch.stack([columns, rows], dim=-1)
        warped = F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return warped.to(x.dtype)
