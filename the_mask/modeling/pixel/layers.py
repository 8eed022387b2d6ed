"""Layers that per-pixel heads and context blocks share. Axes: B frames, C channels, h w feature size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.layers import get_norm
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNorm(nn.Module):
    """Convolution (without bias if there is a norm), norm, ReLU; odd kernels keep the size.

    The parts are called ``conv`` and ``bn`` as in OpenMMLab's checkpoints, whatever the norm is.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, norm: str, *, relu: bool = True) -> None:
        super().__init__()
        bn = get_norm(norm, out_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bn is None)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.bn: nn.Module = nn.Identity() if bn is None else bn
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu_(x) if self.relu else x


def classifier(in_channels: int, num_classes: int) -> nn.Conv2d:
    """1x1 convolution to class logits, weights from N(0, 0.01)."""
    conv = nn.Conv2d(in_channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def resize_to(x: Tensor, size: Sequence[int] | torch.Size) -> Tensor:
    """Bilinear [B, C, h, w] to another (h, w)."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
