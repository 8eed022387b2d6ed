"""Backbone of BiSeNet-R18 (TorchSeg's): a shallow path for detail and a ResNet-18 for context.

Source: arXiv:1808.00897 and TorchSeg's released code.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from the_mask.modeling.backbones.swiftnet_resnet18 import ResNet18, make_norm

WIDTH = 128
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


class BiSeNetBackbone(Backbone):
    """Both paths: ``spatial`` (stride 8, 128 channels), and ``res2`` ... ``res5`` of the context path."""

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
