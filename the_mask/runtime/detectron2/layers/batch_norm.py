"""Normalisation layers, and the choice of one by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils import comm


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm2d with constant statistics and constant affine parameters, all of them buffers.

    [N,C,H,W] -> [N,C,H,W]: ``(x - running_mean) / sqrt(running_var + eps) * weight + bias``.
    """

    _version = 3

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        # With eps added this makes the fresh layer an exact identity.
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        # Present for code that expects it on any BatchNorm, absent from state dicts.
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        # F.batch_norm would compute gradients of weight and bias as well.
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + shift.reshape(1, -1, 1, 1).to(x.dtype)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # Version 1 stored only weight and bias, with the statistics folded in.
        if (local_metadata.get("version") or 1) < 2:
            state_dict.setdefault(prefix + "running_mean", torch.zeros_like(self.running_mean))
            state_dict.setdefault(prefix + "running_var", torch.ones_like(self.running_var))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __repr__(self) -> str:
        return f"FrozenBatchNorm2d(num_features={self.num_features}, eps={self.eps})"

    @classmethod
    def convert_frozen_batchnorm(cls, module: nn.Module) -> nn.Module:
        """Replace every BatchNorm2d and SyncBatchNorm inside ``module`` by a frozen one with the same values.

        Returns:
            ``module`` itself, or its replacement when it is such a norm.
        """
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            frozen = cls(module.num_features, module.eps)
            if module.affine:
                frozen.weight.data = module.weight.data.clone().detach()
                frozen.bias.data = module.bias.data.clone().detach()
            assert module.running_mean is not None
            assert module.running_var is not None
            frozen.running_mean.data = module.running_mean.data
            frozen.running_var.data = module.running_var.data
            # A converted norm, unlike a fresh one, keeps the count in its state dict.
            frozen.register_buffer("num_batches_tracked", module.num_batches_tracked)
            return frozen
        for name, child in module.named_children():
            replacement = cls.convert_frozen_batchnorm(child)
            if replacement is not child:
                module.add_module(name, replacement)
        return module


class LayerNorm(nn.Module):
    """Layer norm over the channels of [N,C,H,W], at each position."""

    def __init__(self, normalized_shape: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(normalized_shape))
        self.bias = nn.Parameter(torch.zeros(normalized_shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        normalised = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * normalised + self.bias[:, None, None]


class _SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over all ranks whose gradient is summed over ranks too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all ranks, on any device, made of differentiable tensor operations.

    ``stats_mode=""`` gives every rank the same weight and so wants batches of one size; ``"N"`` weighs ranks by their
    batch size and accepts empty batches, with statistics over images rather than pixels.
    """

    def __init__(self, *args: Any, stats_mode: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert stats_mode in ("", "N"), stats_mode
        self._stats_mode = stats_mode

    def forward(self, x: Tensor) -> Tensor:
        if comm.get_world_size() == 1 or not self.training:
            return super().forward(x)
        batch, channels = x.shape[:2]
        in_dtype = x.dtype
        x = x.float() if in_dtype == torch.float16 else x
        assert self.momentum is not None
        if self._stats_mode == "":
            assert batch > 0, 'SyncBatchNorm(stats_mode="") does not support zero batch size.'
            moments = torch.cat([x.mean(dim=[0, 2, 3]), (x * x).mean(dim=[0, 2, 3])])
            mean, mean_of_squares = torch.split(_SumOverRanks.apply(moments) / comm.get_world_size(), channels)
            momentum: float | Tensor = self.momentum
        else:
            if batch == 0:
                # An empty batch still takes part in the exchange.
                moments = torch.zeros(2 * channels + 1, device=x.device, dtype=x.dtype) + x.sum()
            else:
                one = torch.ones(1, device=x.device, dtype=x.dtype)
                moments = torch.cat([x.mean(dim=[0, 2, 3]), (x * x).mean(dim=[0, 2, 3]), one]) * batch
            moments = _SumOverRanks.apply(moments)
            total = moments[-1].detach()
            momentum = total.clamp(max=1) * self.momentum
            mean, mean_of_squares, _ = torch.split(moments / total.clamp(min=1), channels)
        var = mean_of_squares - mean * mean
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        assert self.running_mean is not None
        assert self.running_var is not None
        self.running_mean += momentum * (mean.detach() - self.running_mean)
        self.running_var += momentum * (var.detach() - self.running_var)
        out = x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)
        return out.half() if in_dtype == torch.float16 else out


def get_norm(norm: str | Callable[[int], nn.Module] | None, out_channels: int) -> nn.Module | None:
    """Return a new norm layer.

    Args:
        norm: ``BN``, ``SyncBN``, ``nnSyncBN``, ``naiveSyncBN``, ``naiveSyncBN_N``, ``FrozenBN``, ``GN`` (32 groups),
            ``LN``, a callable from channels to module, or ``""``/``None`` for no norm.
        out_channels: channels of the input.

    Raises:
        KeyError: unknown name.
    """
    if norm is None or norm == "":
        return None
    if callable(norm):
        return norm(out_channels)
    builders: dict[str, Callable[[int], nn.Module]] = {
        "BN": nn.BatchNorm2d,
        "SyncBN": nn.SyncBatchNorm,
        "nnSyncBN": nn.SyncBatchNorm,
        "naiveSyncBN": NaiveSyncBatchNorm,
        "naiveSyncBN_N": lambda channels: NaiveSyncBatchNorm(channels, stats_mode="N"),
        "FrozenBN": FrozenBatchNorm2d,
        "GN": lambda channels: nn.GroupNorm(32, channels),
        "LN": LayerNorm,
    }
    return builders[norm](out_channels)
