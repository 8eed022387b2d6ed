"""Head of BiSeNet-R18 (TorchSeg's): attention that refines and fuses the two paths of the backbone.

Axes: B images, K classes, C channels, h w feature sizes. Source: arXiv:1808.00897 and TorchSeg's released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.modeling.backbones.bisenet import SPATIAL, WIDTH, ConvBnRelu
from the_mask.modeling.pixel.context.types import MAIN, ClipFeatures, FrameFeatures, HeadOutput, PriorMap
from the_mask.modeling.pixel.heads.base import PixelHead, level_channels, level_stride, require_levels

FUSED_WIDTH = 256
HEAD_WIDTHS = (256, 256, 64)


class AttentionRefinement(nn.Module):
    """3x3 convolution, then each channel times a gate computed from its mean."""

    def __init__(self, in_channels: int, norm: str) -> None:
        super().__init__()
        self.conv_3x3 = ConvBnRelu(in_channels, WIDTH, 3, norm)
        self.channel_attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), ConvBnRelu(WIDTH, WIDTH, 1, norm, relu=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_3x3(x)
        return x * self.channel_attention(x)


class FeatureFusion(nn.Module):
    """Concatenate both paths, convolve to 256 channels, and add the result times a gate."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.conv_1x1 = ConvBnRelu(2 * WIDTH, FUSED_WIDTH, 1, norm)
        self.channel_attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            ConvBnRelu(FUSED_WIDTH, FUSED_WIDTH, 1, ""),
            ConvBnRelu(FUSED_WIDTH, FUSED_WIDTH, 1, "", relu=False),
            nn.Sigmoid(),
        )

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        x = self.conv_1x1(torch.cat([detail, context], dim=1))
        return x + x * self.channel_attention(x)


class Classifier(nn.Module):
    """3x3 convolution and a linear classifier."""

    def __init__(self, in_channels: int, width: int, num_classes: int, norm: str) -> None:
        super().__init__()
        self.conv_3x3 = ConvBnRelu(in_channels, width, 3, norm)
        self.conv_1x1 = nn.Conv2d(width, num_classes, 1)
        nn.init.kaiming_normal_(self.conv_1x1.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_1x1(self.conv_3x3(x))


@SEM_SEG_HEADS_REGISTRY.register()
class BiSeNetHead(PixelHead):
    """``IN_FEATURES`` = [detail, 1/16, 1/32] -> logits at stride 8; two auxiliary ones of the context path in training.

    With ``build_bisenet_r18_backbone`` this is BiSeNet-R18: 12.89 M parameters for 19 classes, 13.49 M with the two
    auxiliary heads. Keys are TorchSeg's; see :mod:`the_mask.modeling.propagation.official`.
    """

    @configurable
    def __init__(self, *, levels: Mapping[str, ShapeSpec], num_classes: int, norm: str) -> None:
        """
        Args:
            levels: shapes of the detail level (128 channels), the level before the last, and the last.
            num_classes: K.
            norm: as for Detectron2's ``get_norm``.
        """
        super().__init__()
        self.detail, self.middle, self.deep = levels
        channels = [level_channels(shape) for shape in levels.values()]
        if channels[0] != WIDTH:
            raise ValueError(f"level {self.detail} has {channels[0]} channels; BiSeNetHead expects {WIDTH}")
        self.stride = level_stride(levels[self.detail])
        self.global_context = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvBnRelu(channels[2], WIDTH, 1, norm))
        self.arms = nn.ModuleList([AttentionRefinement(channels[2], norm), AttentionRefinement(channels[1], norm)])
        self.refines = nn.ModuleList(ConvBnRelu(WIDTH, WIDTH, 3, norm) for _ in range(2))
        self.ffm = FeatureFusion(norm)
        widths = zip((WIDTH, WIDTH, FUSED_WIDTH), HEAD_WIDTHS, strict=True)
        self.heads = nn.ModuleList(Classifier(inner, width, num_classes, norm) for inner, width in widths)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        options = cfg.MODEL.SEM_SEG_HEAD
        names = list(options.IN_FEATURES)
        if len(names) != 3:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES {names}: BiSeNetHead takes three levels, [{SPATIAL}, res4, res5]"
            )
        shapes = require_levels("MODEL.SEM_SEG_HEAD.IN_FEATURES", names, input_shape)
        return {
            "levels": dict(zip(names, shapes, strict=True)),
            "num_classes": options.NUM_CLASSES,
            "norm": options.NORM,
        }

    def forward(
        self, features: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> HeadOutput:
        detail, deep = features[self.detail], features[self.deep]
        context = self.global_context(deep).expand(-1, -1, *deep.shape[-2:])
        refined = []
        levels = (deep, features[self.middle])
        for level, arm, refine, larger in zip(levels, self.arms, self.refines, (levels[1], detail), strict=True):
            enlarged = F.interpolate(arm(level) + context, size=larger.shape[-2:], mode="bilinear", align_corners=True)
            context = refine(enlarged)
            refined.append(context)
        fused = self.ffm(detail, context)
        aux = {}
        if self.training:
            aux = {f"context{i}": head(x) for i, (head, x) in enumerate(zip(self.heads, refined, strict=False))}
        return HeadOutput(self.heads[-1](fused), aux, dict.fromkeys(aux, 1.0), {MAIN: fused})
