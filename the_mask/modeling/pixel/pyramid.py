"""Pyramid pooling and UPerNet. Axes: B frames, C channels, h w feature size.

Sub-module names are those of mmseg's PSPHead and UPerHead, so that converting their checkpoints is a change of prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from the_mask.modeling.pixel.layers import ConvNorm, resize_to
from the_mask.modeling.pixel.pooling import AdaptiveAverage

POOL_SIZES = (1, 2, 3, 6)


class PyramidPooling(nn.Module):
    """Adaptive average pools, 1x1, enlarged, concatenated with the input: [B, C, h, w] -> [B, C + 4 width, h, w].

    ``psp_modules.<i>.1`` is the convolution of pool i (``.0`` the pool).
    """

    def __init__(self, channels: int, width: int, norm: str, sizes: Sequence[int] = POOL_SIZES) -> None:
        super().__init__()
        self.out_channels = channels + len(sizes) * width
        self.psp_modules = nn.ModuleList(
            nn.Sequential(AdaptiveAverage(size), ConvNorm(channels, width, 1, norm)) for size in sizes
        )

    def pool(self, x: Tensor) -> Tensor:
        """The input concatenated with its pools."""
        return torch.cat([x, *(resize_to(pool(x), x.shape[-2:]) for pool in self.psp_modules)], dim=1)


class UperNet(PyramidPooling):
    """UPerNet (arXiv:1807.10221): pyramid pooling on the last level, top-down additions, all levels joined.

    Levels [B, C_l, h_l, w_l], finest first -> [B, width, h_0, w_0].
    """

    def __init__(self, channels: Sequence[int], width: int, norm: str, sizes: Sequence[int] = POOL_SIZES) -> None:
        """
        Args:
            channels: C_l of at least two levels.
            width: of everything inside.
            norm: as for Detectron2's ``get_norm``.
            sizes: cells per side of the pools.

        Raises:
            ValueError: fewer than two levels.
        """
        if len(channels) < 2:
            raise ValueError(f"UPerNet joins at least two levels, got {len(channels)}")
        super().__init__(channels[-1], width, norm, sizes)
        self.bottleneck = ConvNorm(self.out_channels, width, 3, norm)
        self.lateral_convs = nn.ModuleList(ConvNorm(c, width, 1, norm) for c in channels[:-1])
        self.fpn_convs = nn.ModuleList(ConvNorm(width, width, 3, norm) for _ in channels[:-1])
        self.fpn_bottleneck = ConvNorm(len(channels) * width, width, 3, norm)
        self.out_channels = width

    def join(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels -> feature."""
        maps = [lateral(x) for lateral, x in zip(self.lateral_convs, levels[:-1], strict=True)]
        top = self.bottleneck(self.pool(levels[-1]))
        maps.append(top)
        for i in range(len(maps) - 2, -1, -1):
            maps[i] = maps[i] + resize_to(maps[i + 1], maps[i].shape[-2:])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, maps[:-1], strict=True)] + [top]
        return self.fpn_bottleneck(torch.cat([resize_to(x, outs[0].shape[-2:]) for x in outs], dim=1))
