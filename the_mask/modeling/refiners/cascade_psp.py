"""CascadePSP's refinement network and its cascade. State-dict keys are those of the released checkpoint.

Source: Cheng et al. 2020, "CascadePSP", and the released code's structure. Axes: B crops, C channels, H W crop size.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.modeling.refiners.registry import REFINERS

BLOCKS = (3, 4, 6, 3)
POOLS = (1, 2, 3, 6)
STRIDE = 8


class DilatedResNet(nn.Module):
    """ResNet-50 at output stride 8 for RGB and three masks; the first block of each dilated layer is not dilated."""

    def __init__(self, width: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.channels = width
        self.conv1 = nn.Conv2d(6, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._layer(width, blocks[0], 1, 1)
        self.layer2 = self._layer(2 * width, blocks[1], 2, 1)
        self.layer3 = self._layer(4 * width, blocks[2], 1, 2)
        self.layer4 = self._layer(8 * width, blocks[3], 1, 4)

    def _layer(self, planes: int, blocks: int, stride: int, dilation: int) -> nn.Sequential:
        # torchvision takes a second to import, and few models have a refiner.
        from torchvision.models.resnet import Bottleneck

        wide = planes * Bottleneck.expansion
        shortcut = nn.Sequential(nn.Conv2d(self.channels, wide, 1, stride=stride, bias=False), nn.BatchNorm2d(wide))
        first = Bottleneck(self.channels, planes, stride, shortcut)
        self.channels = wide
        return nn.Sequential(first, *(Bottleneck(wide, planes, dilation=dilation) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 6, H, W] -> features at strides 8, 2 (before its norm) and 4."""
        stem = self.conv1(x)
        quarter = self.layer1(self.maxpool(self.relu(self.bn1(stem))))
        return self.layer4(self.layer3(self.layer2(quarter))), stem, quarter


class PyramidPooling(nn.Module):
    """Pooled context at several sizes, concatenated with its input and mixed."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Conv2d(channels, channels, 1, bias=False)) for size in POOLS
        )
        self.bottleneck = nn.Conv2d(channels * (len(POOLS) + 1), out_channels, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-2], x.shape[-1])
        return self.relu(self.bottleneck(torch.cat([*(_resize(stage(x), size) for stage in self.stages), x], dim=1)))


class UpBlock(nn.Module):
    """Doubles the size: bilinear upsampling, concatenation with a skip, two pre-activated residual blocks."""

    def __init__(self, channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = _pre_activated(channels + skip_channels, out_channels)
        self.conv2 = _pre_activated(out_channels, out_channels)
        self.shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = _resize(x, (skip.shape[-2], skip.shape[-1]))
        x = self.conv(torch.cat([x, skip], dim=1)) + self.shortcut(x)
        return x + self.conv2(x)


@REFINERS.register()
class CascadePSP(nn.Module):
    """Three passes of one network, each seeing the coarser results of the one before.

    ``forward`` is the cascade, :meth:`refine` its end at test time, :meth:`pass_8`, :meth:`pass_4` and :meth:`pass_1`
    the network up to stride 8, 4 and 1.
    """

    @configurable
    def __init__(self, width: int = 64, blocks: tuple[int, ...] = BLOCKS) -> None:
        """
        Args:
            width: channels of the stem; 64 is the released network, a smaller number makes a smaller network.
            blocks: residual blocks per layer.
        """
        super().__init__()
        self.feats = DilatedResNet(width, blocks)
        self.psp = PyramidPooling(32 * width, 16 * width)
        self.up_1 = UpBlock(16 * width, 4 * width, 8 * width)
        self.up_2 = UpBlock(8 * width, width, 4 * width)
        self.up_3 = UpBlock(4 * width, 3, 32)
        self.final_28 = nn.Sequential(nn.Conv2d(16 * width, 32, 1), nn.ReLU(), nn.Conv2d(32, 1, 1))
        self.final_56 = nn.Sequential(nn.Conv2d(8 * width, 32, 1), nn.ReLU(), nn.Conv2d(32, 1, 1))
        self.final_11 = nn.Conv2d(32 + 3, 32, 1)
        self.final_21 = nn.Conv2d(32, 1, 1)
        # Initially the network sees only the picture, so that ImageNet weights of the stem are meaningful.
        with torch.no_grad():
            self.feats.conv1.weight[:, 3:] = 0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        return {"width": cfg.MODEL.REFINER.WIDTH, "blocks": tuple(cfg.MODEL.REFINER.BLOCKS)}

    def forward(self, images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """The cascade.

        Args:
            images: normalised RGB [B, 3, H, W].
            masks: coarse masks in [-1, 1], [B, 1, H, W].

        Returns:
            Logits ``a8``, ``b8``, ``b4``, ``c8``, ``c4``, ``out``, all [B, 1, H, W]: passes a to c, strides 8, 4 and 1.
        """
        images, masks, size = _padded(images, masks)
        first = self.pass_8(images, masks, masks, masks)
        outputs = {"a8": first} | self._from_second(images, masks, first.tanh(), first.tanh())
        return {name: value[..., : size[0], : size[1]] for name, value in outputs.items()}

    def refine(self, images: Tensor, masks: Tensor, coarse: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Probabilities ``out`` and ``c4``, [B, 1, H, W].

        Args:
            images, masks: as :meth:`forward`.
            coarse: replaces the first pass: a map in [-1, 1] that the second pass sees at strides 8 and 4 (the local
                step); None runs the whole cascade (the global step).
        """
        images, masks, size = _padded(images, masks)
        if coarse is None:
            coarse = self.pass_8(images, masks, masks, masks).tanh()
        else:
            coarse = F.pad(coarse, (0, images.shape[-1] - size[1], 0, images.shape[-2] - size[0]), value=-1.0)
        outputs = self._from_second(images, masks, coarse, coarse)
        out, c4 = outputs["out"], outputs["c4"]
        return out[..., : size[0], : size[1]].sigmoid(), c4[..., : size[0], : size[1]].sigmoid()

    def _from_second(self, images: Tensor, masks: Tensor, at_8: Tensor, at_4: Tensor) -> dict[str, Tensor]:
        b8, b4 = self.pass_4(images, masks, at_8, at_4)
        c8, c4, out = self.pass_1(images, masks, b8.tanh(), b4.tanh())
        return {"b8": b8, "b4": b4, "c8": c8, "c4": c4, "out": out}

    def pass_8(self, images: Tensor, masks: Tensor, at_8: Tensor, at_4: Tensor) -> Tensor:
        """The network up to stride 8; logits at the input's size."""
        features, _, _ = self.feats(torch.cat([images, masks, at_8, at_4], dim=1))
        return _like(self.final_28(self.psp(features)), images)

    def pass_4(self, images: Tensor, masks: Tensor, at_8: Tensor, at_4: Tensor) -> tuple[Tensor, Tensor]:
        """The network up to stride 4: logits of strides 8 and 4."""
        features, _, quarter = self.feats(torch.cat([images, masks, at_8, at_4], dim=1))
        context = self.psp(features)
        return _like(self.final_28(context), images), _like(self.final_56(self.up_1(context, quarter)), images)

    def pass_1(self, images: Tensor, masks: Tensor, at_8: Tensor, at_4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The whole network: logits of strides 8, 4 and 1."""
        features, stem, quarter = self.feats(torch.cat([images, masks, at_8, at_4], dim=1))
        context = self.psp(features)
        fourth = self.up_1(context, quarter)
        full = self.up_3(self.up_2(fourth, stem), images)
        out = self.final_21(F.relu(self.final_11(torch.cat([full, images], dim=1))))
        return _like(self.final_28(context), images), _like(self.final_56(fourth), images), out


def _pre_activated(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
    )


def _padded(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Pad at the bottom and right to multiples of 8 (picture 0, mask -1); also returns the size before."""
    height, width = images.shape[-2:]
    amounts = (0, -width % STRIDE, 0, -height % STRIDE)
    return F.pad(images, amounts), F.pad(masks, amounts, value=-1.0), (height, width)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _like(x: Tensor, images: Tensor) -> Tensor:
    return _resize(x, (images.shape[-2], images.shape[-1]))
