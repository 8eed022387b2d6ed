"""SwiftNet's decoder (single scale): spatial pyramid pooling and three upsampling steps with lateral connections.

Axes: B images, K classes, C channels, h w feature sizes. Source: arXiv:1903.08469 and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.modeling.backbones.swiftnet_resnet18 import make_norm
from the_mask.modeling.pixel.context.types import MAIN, ClipFeatures, FrameFeatures, HeadOutput, PriorMap
from the_mask.modeling.pixel.heads.base import PixelHead, level_channels, level_stride, require_levels
from the_mask.modeling.pixel.pooling import adaptive_average, square_columns

WIDTH = 128
POOLED_WIDTH = 42
POOLED_ROWS = (8, 4, 2)
# Momentum of the pyramid pooling's batch norms, which see few cells (released code). The other norms keep 0.1.
POOLING_MOMENTUM = 0.005


class NormReluConv(nn.Module):
    """Norm, ReLU, convolution that keeps the size."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        norm: str,
        bias: bool = False,
        momentum: float | None = None,
    ) -> None:
        super().__init__()
        self.norm = make_norm(norm, in_channels, momentum)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x).relu())


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class SpatialPyramidPooling(nn.Module):
    """[B, C, h, w] -> [B, 128, h, w]: the map and its means over 8, 4 and 2 rows of nearly square cells."""

    def __init__(self, in_channels: int, norm: str) -> None:
        super().__init__()

        def unit(in_channels: int, out_channels: int) -> NormReluConv:
            return NormReluConv(in_channels, out_channels, 1, norm, momentum=POOLING_MOMENTUM)

        levels = {"spp_bn": unit(in_channels, WIDTH)}
        for number in range(len(POOLED_ROWS)):
            levels[f"spp{number}"] = unit(WIDTH, POOLED_WIDTH)
        levels["spp_fuse"] = unit(WIDTH + POOLED_WIDTH * len(POOLED_ROWS), WIDTH)
        self.spp = nn.ModuleDict(levels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.spp["spp_bn"](x)
        height, width = x.shape[-2:]
        parts = [x]
        for number, rows in enumerate(POOLED_ROWS):
            pooled = adaptive_average(x, rows, square_columns(rows, height, width))
            parts.append(_resize(self.spp[f"spp{number}"](pooled), x.shape[-2:]))
        return self.spp["spp_fuse"](torch.cat(parts, dim=1))


class Upsample(nn.Module):
    """Enlarge to a lateral map's size, add it, blend."""

    def __init__(self, skip_channels: int, norm: str) -> None:
        super().__init__()
        self.bottleneck = NormReluConv(skip_channels, WIDTH, 1, norm)
        self.blend_conv = NormReluConv(WIDTH, WIDTH, 3, norm)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        skip = self.bottleneck(skip)
        return self.blend_conv(_resize(x, skip.shape[-2:]) + skip)


@SEM_SEG_HEADS_REGISTRY.register()
class SwiftNetHead(PixelHead):
    """Backbone levels, finest first (``IN_FEATURES``) -> logits at the finest one's stride.

    With ``build_swiftnet_r18_backbone`` this is SwiftNet-R18: 11,797,071 parameters for 19 classes. Keys are those of
    the released model (``spp``, ``upsample``, ``logits``); see :mod:`the_mask.modeling.propagation.official`.
    """

    @configurable
    def __init__(self, *, levels: Sequence[str], shapes: Sequence[ShapeSpec], num_classes: int, norm: str) -> None:
        """
        Args:
            levels: backbone levels, finest first, at least two, of these ``shapes``.
            num_classes: K.
            norm: as for Detectron2's ``get_norm``.
        """
        super().__init__()
        if len(levels) < 2:
            raise ValueError(f"MODEL.SEM_SEG_HEAD.IN_FEATURES {list(levels)}: SwiftNetHead needs two levels or more")
        self.levels = tuple(levels)
        self.stride = level_stride(shapes[0])
        self.spp = SpatialPyramidPooling(level_channels(shapes[-1]), norm)
        self.upsample = nn.ModuleList(Upsample(level_channels(shape), norm) for shape in reversed(shapes[:-1]))
        self.logits = NormReluConv(WIDTH, num_classes, 1, norm, bias=True)
        nn.init.zeros_(self.logits.conv.bias)  # type: ignore[arg-type]  # made with a bias

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        options = cfg.MODEL.SEM_SEG_HEAD
        return {
            "levels": options.IN_FEATURES,
            "shapes": require_levels("MODEL.SEM_SEG_HEAD.IN_FEATURES", options.IN_FEATURES, input_shape),
            "num_classes": options.NUM_CLASSES,
            "norm": options.NORM,
        }

    def forward(
        self, features: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> HeadOutput:
        x = self.spp(features[self.levels[-1]])
        for step, level in zip(self.upsample, self.levels[-2::-1], strict=True):
            x = step(x, features[level])
        return HeadOutput(self.logits(x), features={MAIN: x})
