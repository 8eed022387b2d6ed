"""ResNet-18 with torchvision's parameter names, whose stages can return their sums before the ReLU.

Axes: B images, C channels, H W pixels.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from the_mask.modeling.backbones.common import PyramidBackbone

WIDTHS = (64, 128, 256, 512)


def make_norm(name: str, channels: int, momentum: float | None = None) -> nn.Module:
    """Norm layer by Detectron2's name. An empty name is a ValueError, because the networks here need a norm.

    Args:
        name: as for Detectron2's ``get_norm``.
        channels: of the input.
        momentum: share of a new batch in the running statistics of a batch norm; None keeps the norm's own.
    """
    norm = get_norm(name, channels)
    if norm is None:
        raise ValueError("an empty norm was configured; expected BN, SyncBN, FrozenBN or GN")
    if momentum is not None and isinstance(norm, _BatchNorm):
        norm.momentum = momentum
    return norm


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; returns the sum **before** the ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, out_channels, 3, stride)
        self.bn1 = make_norm(norm, out_channels)
        self.conv2 = _conv(out_channels, out_channels, 3, 1)
        self.bn2 = make_norm(norm, out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(_conv(in_channels, out_channels, 1, stride), make_norm(norm, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return out + (x if self.downsample is None else self.downsample(x))


class ResNet18(PyramidBackbone):
    """``res2`` ... ``res5`` at strides 4 ... 32 with 64 ... 512 channels.

    Args:
        norm: of all layers, see :func:`make_norm`.
        pre_relu: return each stage's last sum before its ReLU (``MODEL.SWIFTNET.PRE_RELU``).
        freeze_at: see :meth:`PyramidBackbone.freeze_stages`.
    """

    def __init__(self, norm: str = "BN", pre_relu: bool = False, freeze_at: int = 0) -> None:
        super().__init__(WIDTHS)
        self.pre_relu = pre_relu
        self.conv1 = _conv(3, 64, 7, 2)
        self.bn1 = make_norm(norm, 64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        before = 64
        for number, width in enumerate(WIDTHS, start=1):
            stride = 1 if number == 1 else 2
            blocks = nn.Sequential(Block(before, width, stride, norm), Block(width, width, 1, norm))
            self.add_module(f"layer{number}", blocks)
            before = width
        self.freeze_stages([[self.conv1, self.bn1], *([stage] for stage in self.stages())], freeze_at)

    def stages(self) -> list[nn.Sequential]:
        """The blocks of ``res2`` ... ``res5``."""
        return [self.get_submodule(f"layer{number}") for number in range(1, 5)]  # type: ignore[misc]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        features = {}
        for level, stage in zip(self._out_features, self.stages(), strict=True):
            for block in stage:
                before = block(x)
                x = before.relu()
            features[level] = before if self.pre_relu else x
        return features


@BACKBONE_REGISTRY.register()
def build_swiftnet_r18_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet18:
    """SwiftNet's ResNet-18: ``MODEL.RESNETS.NORM``, ``MODEL.BACKBONE.FREEZE_AT``, ``MODEL.SWIFTNET.PRE_RELU``."""
    return ResNet18(cfg.MODEL.RESNETS.NORM, cfg.MODEL.SWIFTNET.PRE_RELU, cfg.MODEL.BACKBONE.FREEZE_AT)
