"""ResNet of output stride 8 with a deep stem ("v1c, d8"), on Detectron2's ResNet. Axes: B images, H W image size.

``build_resnet_backbone`` cannot do this: it dilates res5 only, not at all below 50 layers, and has a 7x7 stem.
"""

from __future__ import annotations

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BottleneckBlock, ResNet
from torch import Tensor, nn

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
STRIDES = (1, 2, 1, 1)
DILATIONS = (1, 1, 2, 4)
STEM_CHANNELS = 64


def conv_norm(
    in_channels: int, out_channels: int, kernel: int, norm: str, stride: int = 1, dilation: int = 1
) -> Conv2d:
    """Convolution of odd kernel and its norm, without bias; stride 1 keeps the size."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel,
        stride=stride,
        padding=dilation * (kernel // 2),
        dilation=dilation,
        bias=False,
        norm=get_norm(norm, out_channels),
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class DeepStem(CNNBlockBase):
    """Three 3x3 convolutions and a max pool: [B,C,H,W] -> [B,64,ceil(H/4),ceil(W/4)]."""

    def __init__(self, in_channels: int, norm: str) -> None:
        super().__init__(in_channels, STEM_CHANNELS, 4)
        half = STEM_CHANNELS // 2
        self.conv1_1 = conv_norm(in_channels, half, 3, norm, stride=2)
        self.conv1_2 = conv_norm(half, half, 3, norm)
        self.conv1_3 = conv_norm(half, STEM_CHANNELS, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1_1, self.conv1_2, self.conv1_3):
            x = F.relu_(conv(x))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class DilatedBasicBlock(CNNBlockBase):
    """Two 3x3 convolutions and a shortcut, as in ResNet-18; only the first one is strided and dilated."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, dilation: int, norm: str) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = (
            conv_norm(in_channels, out_channels, 1, norm, stride=stride) if in_channels != out_channels else None
        )
        self.conv1 = conv_norm(in_channels, out_channels, 3, norm, stride=stride, dilation=dilation)
        self.conv2 = conv_norm(out_channels, out_channels, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu_(self.conv1(x)))
        return F.relu_(out + (x if self.shortcut is None else self.shortcut(x)))


def block_dilations(dilation: int, blocks: int) -> list[int]:
    """Dilations within a stage: the first block of a dilated stage has half the dilation of the others."""
    return [max(1, dilation // 2)] + [dilation] * (blocks - 1)


def make_stages(depth: int, norm: str, first_width: int = 64) -> list[list[CNNBlockBase]]:
    """Blocks of res2 ... res5 at strides 4, 8, 8, 8; ``first_width`` is the inner width of res2, doubled by stage."""
    bottleneck = depth >= 50
    stages = []
    in_channels = STEM_CHANNELS
    for i, blocks in enumerate(DEPTHS[depth]):
        width = first_width * 2**i
        out_channels = width * 4 if bottleneck else width
        own = {"bottleneck_channels": width, "stride_in_1x1": False} if bottleneck else {}
        stage = ResNet.make_stage(
            BottleneckBlock if bottleneck else DilatedBasicBlock,
            blocks,
            in_channels=in_channels,
            out_channels=out_channels,
            stride_per_block=[STRIDES[i]] + [1] * (blocks - 1),
            dilation_per_block=block_dilations(DILATIONS[i], blocks),
            norm=norm,
            **own,
        )
        stages.append(stage)
        in_channels = out_channels
    return stages


@BACKBONE_REGISTRY.register()
def build_resnet_d8_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """ResNet-d8 of ``MODEL.RESNETS.{DEPTH,NORM,OUT_FEATURES,WIDTH_PER_GROUP}`` and ``MODEL.BACKBONE.FREEZE_AT``.

    The published recipes use ``NORM: SyncBN`` and WIDTH_PER_GROUP 64 (a smaller value makes a narrower network). Stem,
    strides and dilations are fixed.

    Raises:
        ValueError: a depth that does not exist.
    """
    options = cfg.MODEL.RESNETS
    if options.DEPTH not in DEPTHS:
        raise ValueError(f"MODEL.RESNETS.DEPTH={options.DEPTH}: must be one of {', '.join(map(str, DEPTHS))}")
    return ResNet(
        DeepStem(input_shape.channels or 3, options.NORM),
        make_stages(options.DEPTH, options.NORM, options.WIDTH_PER_GROUP),
        out_features=options.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
