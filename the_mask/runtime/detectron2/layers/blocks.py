"""Base class of the blocks of a CNN."""

from __future__ import annotations

from torch import nn
from typing_extensions import Self

from .batch_norm import FrozenBatchNorm2d


class CNNBlockBase(nn.Module):
    """A block [N,in_channels,H,W] -> [N,out_channels,H/stride,W/stride] that can be frozen."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def freeze(self) -> Self:
        """Stop gradients of all parameters, turn BatchNorms into ``FrozenBatchNorm2d``, and return the block."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        FrozenBatchNorm2d.convert_frozen_batchnorm(self)
        return self
