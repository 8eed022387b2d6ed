"""BiSeNet-R18 (TorchSeg's): a shallow path for detail, a ResNet-18 for context, attention to refine and fuse them.

Axes: B images, K classes, C channels, h w feature sizes. Source: arXiv:1808.00897 and TorchSeg's released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SEM_SEG_HEADS_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.modeling.context.types import MAIN, ClipFeatures, FrameFeatures, HeadOutput, PriorMap
from the_mask.modeling.heads.base import PixelHead, level_channels, level_stride, require_levels
from the_mask.modeling.keyframe.resnet18 import ResNet18, make_norm

WIDTH = 128
FUSED_WIDTH = 256
HEAD_WIDTHS = (256, 256, 64)
SPATIAL = "spatial"


class ConvBnRelu(nn.Module):
    """Convolution without bias, norm (key ``bn``) and ReLU, the last two optional."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, norm: str, stride: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_in", nonlinearity="relu")
        self.bn = make_norm(norm, out_channels) if norm else None
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        return x.relu() if self.relu else x


class SpatialPath(nn.Module):
    """[B, 3, H, W] -> [B, 128, H/8, W/8]."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.conv_7x7 = ConvBnRelu(3, 64, 7, norm, stride=2)
        self.conv_3x3_1 = ConvBnRelu(64, 64, 3, norm, stride=2)
        self.conv_3x3_2 = ConvBnRelu(64, 64, 3, norm, stride=2)
        self.conv_1x1 = ConvBnRelu(64, WIDTH, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_1x1(self.conv_3x3_2(self.conv_3x3_1(self.conv_7x7(x))))


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
    """Both paths side by side -> 256 channels, plus themselves times a gate."""

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


class BiSeNetBackbone(Backbone):
    """Both paths: ``spatial`` (stride 8, 128 channels) beside ``res2`` ... ``res5`` of the context path."""

    def __init__(self, norm: str = "BN", freeze_at: int = 0) -> None:
        """``freeze_at`` counts stages of the context path."""
        super().__init__()
        self.spatial_path = SpatialPath(norm)
        self.context_path = ResNet18(norm, freeze_at=freeze_at)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {SPATIAL: ShapeSpec(channels=WIDTH, stride=8), **self.context_path.output_shape()}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {SPATIAL: self.spatial_path(x), **self.context_path(x)}


@BACKBONE_REGISTRY.register()
def build_bisenet_r18_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> BiSeNetBackbone:
    """BiSeNet's two paths, with ``MODEL.RESNETS.NORM`` and ``MODEL.BACKBONE.FREEZE_AT``."""
    return BiSeNetBackbone(cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT)


@SEM_SEG_HEADS_REGISTRY.register()
class BiSeNetHead(PixelHead):
    """``IN_FEATURES`` = [detail, 1/16, 1/32] -> logits at stride 8; two auxiliary ones of the context path in training.

    With ``build_bisenet_r18_backbone`` this is BiSeNet-R18: 12.89 M parameters for 19 classes, 13.49 M with the two
    auxiliary heads. Keys are TorchSeg's; see :mod:`the_mask.modeling.keyframe.official`.
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
