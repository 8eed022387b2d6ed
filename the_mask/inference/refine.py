"""Refine one mask: CascadePSP's global step on the whole picture, and local step on tiles of it.

Axes: H W picture size, L side that the network works at. Source: CascadePSP, section 3.3, and released code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LONG_EDGE = 900
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
# Local step: overlap added to the tiles, margin trimmed from their inner sides, and the range of the foreground share
# in which a tile is refined.
OVERLAP = 32
TRIM = 16
LEAST_SHARE = 0.1


def normalised(image: Tensor) -> Tensor:
    """Normalise uint8 RGB [3, H, W] as in training: scaled to 0..1, ImageNet mean and standard deviation."""
    mean, std = (torch.tensor(v, device=image.device)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
    return (image.float() / 255 - mean) / std


def working_size(
    height: int, width: int, long_edge: int = LONG_EDGE, least: int = 0, multiple: int = 1
) -> tuple[int, int]:
    """Size at which a crop is refined.

    Args:
        height, width: of the crop.
        long_edge: larger crops are scaled down to it.
        least: crops whose long edge is smaller are scaled up to it; 0 switches this off.
        multiple: both sides are rounded to multiples of this (at least one), so that crops share sizes and batches.
    """
    longest = max(height, width)
    factor = min(1.0, long_edge / longest) if longest >= least else least / longest
    first, second = (max(1, round(side * factor / multiple)) * multiple for side in (height, width))
    return first, second


def global_step(network: Any, image: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Run the cascade at ``size``.

    Args:
        network: a :class:`~the_mask.modeling.refiners.CascadePSP` in eval mode.
        image: normalised RGB [B, 3, H, W].
        mask: coarse, in [-1, 1], [B, 1, H, W].
        size: see :func:`working_size`.

    Returns:
        Probabilities ``out`` and ``c4`` at ``size``, [B, 1, h, w].
    """
    shrinks = size[0] <= image.shape[-2] and size[1] <= image.shape[-1]
    small = resize(image, size, "area" if shrinks else "bicubic")
    return network.refine(small, resize(mask, size, "area" if shrinks else "bilinear"))


@torch.no_grad()
def refine_mask(network: Any, image: Tensor, mask: Tensor, long_edge: int = LONG_EDGE, local: bool = True) -> Tensor:
    """Refine one binary mask.

    Args:
        network: in eval mode; the picture goes to its device.
        image: uint8 RGB [3, H, W].
        mask: bool [H, W].
        long_edge: L. If the picture is not larger, or without the local step, only the global step runs.
        local: also refine tiles at full resolution.

    Returns:
        Probability of the foreground, float32 [H, W] on the network's device. A mask that is empty or fills the picture
        has no border to refine and is returned as 0 or 1.
    """
    device = next(network.parameters()).device
    if not mask.any() or mask.all():
        return mask.to(device).float()
    picture = normalised(image.to(device))[None]
    coarse = mask.to(picture)[None, None] * 2 - 1
    height, width = mask.shape
    out, c4 = global_step(network, picture, coarse, working_size(height, width, long_edge))
    whole = resize(out, (height, width), "bilinear")
    if not local or max(height, width) <= long_edge:
        return whole[0, 0]
    return local_step(network, picture, whole, resize(c4, (height, width), "bilinear"), long_edge)[0, 0]


def local_step(network: Any, image: Tensor, whole: Tensor, c4: Tensor, side: int) -> Tensor:
    """Refine tiles of ``side`` pixels of the full-resolution picture, starting from the global step's results.

    Args:
        image: normalised RGB [1, 3, H, W].
        whole, c4: the global step's probabilities at the picture's size, [1, 1, H, W].
        side: L.

    Returns:
        [1, 1, H, W]: overlapping tiles averaged; the binarised global result where no tile was refined.
    """
    height, width = image.shape[-2:]
    # Not sign(), because a probability of exactly 0.5 must be mapped to one or the other.
    binary = (whole > 0.5).to(whole) * 2 - 1
    fourth = c4 * 2 - 1
    total, count = torch.zeros_like(whole), torch.zeros_like(whole)
    for top, left in tile_corners(height, width, side):
        bottom, right = min(top + side, height), min(left + side, width)
        box = (..., slice(top, bottom), slice(left, right))
        share = float((binary[box] > 0).float().mean())
        if not LEAST_SHARE <= share <= 1 - LEAST_SHARE:
            continue
        out, _ = network.refine(image[box], binary[box], coarse=fourth[box])
        up, down = (TRIM if top > 0 else 0), (TRIM if bottom < height else 0)
        before, after = (TRIM if left > 0 else 0), (TRIM if right < width else 0)
        inner = (..., slice(top + up, bottom - down), slice(left + before, right - after))
        total[inner] += out[..., up : out.shape[-2] - down, before : out.shape[-1] - after]
        count[inner] += 1
    return torch.where(count > 0, total / count.clamp(min=1), (binary > 0).to(whole))


def tile_corners(height: int, width: int, side: int) -> list[tuple[int, int]]:
    """(top, left) of tiles of ``side`` pixels half a side less the overlap apart, shifted back inside."""
    step = max(side // 2 - OVERLAP, 1)

    def starts(length: int) -> Iterable[int]:
        return dict.fromkeys(max(0, min(start, length - side)) for start in range(0, length, step))

    return [(top, left) for top in starts(height) for left in starts(width)]


def resize(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """[B, C, H, W] to another size."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    corners = None if mode == "area" else False
    return F.interpolate(x, size=tuple(size), mode=mode, align_corners=corners)
