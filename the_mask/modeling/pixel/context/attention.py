"""Dense attention as functions: pooling of keys, and softmax attention whose memory is linear in queries and keys.

Axes: B clips, T slots, C key channels, V value channels, N = h w queries, S keys, h w feature size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from the_mask.modeling.pixel.context.types import all_valid
from the_mask.modeling.pixel.pooling import adaptive_average

POOLS = ("cube", "clipped", "plane")


def attend(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * query^T key) value over valid keys; a clip without any valid key gets zeros.

    The N x S map never exists as a whole: ``scaled_dot_product_attention`` works in blocks where keys and values have
    one width, which is why the narrower side is padded with zeros (that changes no product).

    Args:
        query: [B, C, N].
        key: [B, C, S].
        value: [B, V, S].
        valid: bool [B, S], or None for all.
        scale: of the logits; 1 in TMANet.

    Returns:
        [B, V, N].
    """
    width = max(key.shape[1], value.shape[1])
    q, k, v = (_heads_first(x, width) for x in (query, key, value))
    mask, any_valid = None, None
    if valid is not None:
        any_valid = valid.any(dim=1)
        # A row without keys would be 0/0.
        mask = (valid | ~any_valid[:, None])[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[:, 0].transpose(1, 2)
    out = out[:, : value.shape[1]]
    return out if any_valid is None else out * any_valid[:, None, None]


def _heads_first(x: Tensor, width: int) -> Tensor:
    """[B, C, N] -> [B, 1, N, width], contiguous."""
    x = x.transpose(1, 2).unsqueeze(1)
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x.contiguous()


def flatten_slots(frames: Tensor) -> Tensor:
    """[B, T, C, h, w] -> [B, C, T h w]."""
    return frames.transpose(1, 2).flatten(2)


def slot_mask(valid: Tensor, cells: int) -> Tensor | None:
    """Validity of every key, [B, T] -> [B, T cells]; None when all are valid."""
    return None if all_valid(valid) else valid.repeat_interleave(cells, dim=1)


def pool_bins(size_in: int, size_out: int) -> Tensor:
    """Membership of adaptive average pooling along one axis: bool [size_out, size_in]."""
    bins = torch.zeros(size_out, size_in, dtype=torch.bool)
    for i in range(size_out):
        bins[i, i * size_in // size_out : -(-(i + 1) * size_in // size_out)] = True
    return bins


def time_bins(sizes: Sequence[int], slots: int, mode: str) -> list[Tensor]:
    """Time bins, bool [s_t, T], for each spatial size s.

    ``cube``: s of them (as published; more than T repeat), ``clipped``: min(s, T), ``plane``: T, a slot each.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in POOLS:
        raise ValueError(f"POOL {mode!r}: expected one of {', '.join(POOLS)}")
    counts = {"cube": list(sizes), "clipped": [min(s, slots) for s in sizes], "plane": [slots] * len(sizes)}[mode]
    return [pool_bins(slots, count) for count in counts]


def pooled_slots(frames: Tensor, valid: Tensor, sizes: Sequence[int], mode: str) -> tuple[Tensor, Tensor | None]:
    """Pyramid of average-pooled anchors of a clip: adaptive over space at each size, over valid slots in time.

    Args:
        frames: [B, T, C, h, w].
        valid: bool [B, T].
        sizes: s, cells per side.
        mode: see :func:`time_bins`.

    Returns:
        [B, C, S], and which anchors hold a valid slot, bool [B, S] (None: all).
    """
    batch, slots = valid.shape
    anchors, marks = [], []
    for size, bins in zip(sizes, time_bins(sizes, slots, mode), strict=True):
        # Bins are boxes, so the mean over a box is the mean over time of the means over space.
        cells = adaptive_average(frames.flatten(0, 1), size, size).unflatten(0, (batch, slots))
        inside = (bins.to(valid.device)[None] & valid[:, None]).to(cells.dtype)
        weights = inside / inside.sum(dim=2, keepdim=True).clamp(min=1)
        anchors.append(torch.einsum("bst,btcij->bcsij", weights, cells).flatten(2))
        marks.append((inside.sum(dim=2) > 0).repeat_interleave(size * size, dim=1))
    mask = None if all_valid(valid) else torch.cat(marks, dim=1)
    return torch.cat(anchors, dim=2), mask


def pooled_frame(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Pyramid of average-pooled anchors of one frame: [B, C, h, w] -> [B, C, S]."""
    return torch.cat([adaptive_average(x, size, size).flatten(2) for size in sizes], dim=2)
