"""Shared by all backbones: the four-level base class, stochastic depth, freezing. Axes: B images, C channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LEVELS = ("res2", "res3", "res4", "res5")
STRIDES = (4, 8, 16, 32)


class PyramidBackbone(Backbone):
    """A Detectron2 backbone whose ``forward`` maps images [B,3,H,W] to ``{"res2": [B,C2,h2,w2], ... "res5"}``.

    Args:
        channels: channels of ``res2`` ... ``res5``.
        strides: their strides in pixels.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int] = STRIDES) -> None:
        super().__init__()
        self._out_features = list(LEVELS)
        self._out_feature_channels = dict(zip(LEVELS, channels, strict=True))
        self._out_feature_strides = dict(zip(LEVELS, strides, strict=True))
        self._frozen: list[nn.Module] = []

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
            for name in self._out_features
        }

    def freeze_stages(self, stages: Sequence[Iterable[nn.Module]], freeze_at: int) -> None:
        """Freeze the first ``freeze_at`` groups: no gradients, and eval mode even after ``train()``.

        Detectron2's counting: 1 is the stem, 2 the stem and ``res2``, and so on.

        Args:
            stages: modules of the stem, of ``res2``, ... of ``res5``.
            freeze_at: ``MODEL.BACKBONE.FREEZE_AT``; 0 freezes nothing.

        Raises:
            ValueError: ``freeze_at`` outside 0..len(stages).
        """
        if not 0 <= freeze_at <= len(stages):
            raise ValueError(f"MODEL.BACKBONE.FREEZE_AT={freeze_at}: must be in 0..{len(stages)}")
        self._frozen = [module for stage in stages[:freeze_at] for module in stage]
        for module in self._frozen:
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> PyramidBackbone:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth (arXiv:1603.09382): zero whole samples of a residual branch and rescale the others.

    Args:
        x: [B,...] output of a residual branch.
        rate: probability that a sample loses the branch, in [0,1).
        training: False returns ``x``.
    """
    if rate == 0.0 or not training:
        return x
    keep = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device) >= rate
    return x * (keep.to(x.dtype) / (1.0 - rate))


class DropPath(nn.Module):
    """Module form of :func:`drop_path`; it has no parameters, so key names do not depend on the rate."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.rate, self.training)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def drop_path_rates(depths: Sequence[int], rate: float) -> list[list[float]]:
    """Rates of all blocks, rising linearly from 0 (first block) to ``rate`` (last block), split by stage.

    Raises:
        ValueError: ``rate`` outside [0,1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"DROP_PATH={rate}: must be in [0,1)")
    total = sum(depths)
    rates = [rate * i / max(1, total - 1) for i in range(total)]
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths)]


def run_blocks(blocks: Iterable[Callable[..., Tensor]], x: Tensor, *args: Any, recompute: bool) -> Tensor:
    """Chain ``x = block(x, *args)``; with ``recompute``, activations are recomputed in the backward pass."""
    for block in blocks:
        x = checkpoint(block, x, *args, use_reentrant=False) if recompute else block(x, *args)
    return x


def init_transformer_weights(module: nn.Module) -> None:
    """Initialise one module as vision transformers do; use with ``module.apply``.

    Linear: truncated normal of sd 0.02, zero bias. Convolution: normal of sd sqrt(2 / fan-out), zero bias.
    Norms keep PyTorch's ones and zeros.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        kernel_height, kernel_width = module.kernel_size
        fan_out = kernel_height * kernel_width * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
