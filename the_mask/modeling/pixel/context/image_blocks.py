"""Blocks that read only the current frame: ``embed``, ``ppm``, ``uper``, ``channel``.

Axes: B frames, C channels, N = h w.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from the_mask.modeling.pixel.context.registry import BlockInputs, ContextBlock, block_type
from the_mask.modeling.pixel.context.types import MAIN, BlockOutput, ClipFeatures, FrameFeatures, PriorMap
from the_mask.modeling.pixel.layers import ConvNorm, resize_to
from the_mask.modeling.pixel.pyramid import PyramidPooling, UperNet


class Embed(ContextBlock):
    """Levels resized to one of them, concatenated, 3x3 convolution: the input of memory and attention blocks."""

    apply_to_memory = True

    def __init__(self, levels: Sequence[str], channels: Sequence[int], size_level: str, width: int, norm: str) -> None:
        """
        Args:
            levels: names, with their ``channels``.
            size_level: the level whose size the result has.
            width: channels of the result.
            norm: as for Detectron2's ``get_norm``.
        """
        super().__init__()
        self.in_levels = tuple(levels)
        self.out_level = size_level
        self.out_channels = width
        self.conv = ConvNorm(sum(channels), width, 3, norm)

    def forward(
        self, query: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> BlockOutput:
        size = query[self.out_level].shape[-2:]
        return BlockOutput(self.conv(torch.cat([resize_to(query[level], size) for level in self.in_levels], dim=1)))


class PoolBlock(PyramidPooling, ContextBlock):
    """Pyramid pooling and a 3x3 convolution: PSPNet's head without its classifier."""

    def __init__(self, channels: int, width: int, norm: str, sizes: Sequence[int]) -> None:
        super().__init__(channels, width, norm, sizes)
        self.bottleneck = ConvNorm(self.out_channels, width, 3, norm)
        self.out_channels = width

    def forward(
        self, query: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> BlockOutput:
        return BlockOutput(self.bottleneck(self.pool(query[MAIN])))


class UperBlock(UperNet, ContextBlock):
    """UPerNet without its classifier; the result has the size of the finest level."""

    def __init__(
        self, levels: Sequence[str], channels: Sequence[int], width: int, norm: str, sizes: Sequence[int]
    ) -> None:
        super().__init__(channels, width, norm, sizes)
        self.in_levels = tuple(levels)
        self.out_level = self.in_levels[0]

    def forward(
        self, query: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> BlockOutput:
        return BlockOutput(self.join([query[level] for level in self.in_levels]))


def channel_attention(x: Tensor) -> Tensor:
    """DANet's channel attention: A = softmax(rowmax(E) - E) with E = X X^T, then A X; [B, C, h, w] -> the same.

    Energies of thousands of positions overflow half precision, so they are computed in float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        flat = x.flatten(2).float()
        energy = flat @ flat.transpose(1, 2)
        weights = (energy.amax(dim=-1, keepdim=True) - energy).softmax(dim=-1)
        return (weights @ flat).view_as(x).to(x.dtype)


class ChannelBlock(ContextBlock):
    """3x3, channel attention as a residual with weight gamma (0 at the start), 3x3."""

    def __init__(self, channels: int, width: int, norm: str, num_classes: int = 0) -> None:
        """
        Args:
            channels: of the main level.
            width: of the result.
            norm: as for Detectron2's ``get_norm``.
            num_classes: K gives the branch a classifier of its own (weight 1), 0 does not.
        """
        super().__init__()
        self.out_channels = width
        self.before = ConvNorm(channels, width, 3, norm)
        self.after = ConvNorm(width, width, 3, norm)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.branch_classifier = nn.Conv2d(width, num_classes, 1) if num_classes else None

    def forward(
        self, query: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> BlockOutput:
        x = self.before(query[MAIN])
        x = self.after(self.gamma * channel_attention(x) + x)
        if self.branch_classifier is None or not self.training:
            return BlockOutput(x)
        return BlockOutput(x, {"channel": self.branch_classifier(x)}, {"channel": 1.0})


@block_type("embed")
def build_embed(inputs: BlockInputs) -> ContextBlock:
    """Chosen levels (``LEVELS``; [] is the main one) at the size of ``SIZE_LEVEL`` ("" is the finest of them)."""
    options = inputs.options
    levels = list(options.LEVELS) or [MAIN]
    channels = [inputs.channels(level) for level in levels]
    finest = min(levels, key=lambda level: inputs.levels[level].stride or 1)
    size_level = options.SIZE_LEVEL or finest
    if size_level not in levels:
        raise ValueError(
            f"MODEL.BLOCKS.{inputs.name.upper()}.SIZE_LEVEL {size_level!r}: expected one of LEVELS, {', '.join(levels)}"
        )
    return Embed(levels, channels, size_level, options.CHANNELS, inputs.norm)


@block_type("ppm")
def build_ppm(inputs: BlockInputs) -> ContextBlock:
    """Pyramid pooling module of the main level."""
    return PoolBlock(inputs.channels(), inputs.options.CHANNELS, inputs.norm, inputs.options.SIZES)


@block_type("uper")
def build_uper(inputs: BlockInputs) -> ContextBlock:
    """UPerNet over ``LEVELS`` ([]: MODEL.SEM_SEG_HEAD.IN_FEATURES), finest first."""
    options = inputs.options
    levels = list(options.LEVELS) or list(inputs.cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES)
    channels = [inputs.channels(level) for level in levels]
    return UperBlock(levels, channels, options.CHANNELS, inputs.norm, options.SIZES)


@block_type("channel")
def build_channel(inputs: BlockInputs) -> ContextBlock:
    """DANet's channel branch."""
    options = inputs.options
    classes = inputs.num_classes if options.CLASSIFIER else 0
    return ChannelBlock(inputs.channels(), options.CHANNELS, inputs.norm, classes)
