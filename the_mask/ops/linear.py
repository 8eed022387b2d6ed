"""The linear layer that predicts sampling offsets."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Determined once, because torch.compile in torch 2.9 cannot trace the query. The meta device, for example, has none.
_WITH_AUTOCAST = frozenset(
    name for name in ("cpu", "cuda", "mps", "xpu", "hpu", "xla") if torch.amp.is_autocast_available(name)
)


def linear_in_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply ``layer`` in float32 (float64 if it is float64), even under autocast or with half-precision parameters.

    Offsets are in pixels: bfloat16 rounds an offset of 8 pixels to a 16th of a pixel, which is visible in the result.
    """
    work = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
    has_autocast = x.device.type in _WITH_AUTOCAST
    if layer.weight.dtype == x.dtype == work and not (has_autocast and torch.is_autocast_enabled(x.device.type)):
        return layer(x)
    bias = None if layer.bias is None else layer.bias.to(work)
    with torch.autocast(x.device.type, enabled=False) if has_autocast else contextlib.nullcontext():
        return F.linear(x.to(work), layer.weight.to(work), bias)
