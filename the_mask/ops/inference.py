"""Shortcuts of inference on a CPU, whose results differ from those of training by rounding only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from the_mask.ops.selection import wants_standard


def is_plain_inference(*tensors: Tensor) -> bool:
    """Whether float32 tensors on a CPU are used without gradients, autocast, tracing or compiling."""
    return not torch.is_grad_enabled() and is_plain(*tensors)


def is_plain(*tensors: Tensor) -> bool:
    """Whether float32 tensors on a CPU are used without autocast, tracing or compiling."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or wants_standard()
        or torch.is_autocast_enabled("cpu")
        or any(x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel() for x in tensors)
    )


def softmax_of_few(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Softmax over a last axis of few values (sampling points): PyTorch takes five times as long for it on CPUs."""
    if not is_plain(x):
        return x.softmax(-1, dtype=dtype)
    softmax: Tensor = _SoftmaxOfFew.apply(x)
    return softmax


class _SoftmaxOfFew(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        powers = (x - x.amax(-1, keepdim=True)).exp_()
        result = powers.div_(powers.sum(-1, keepdim=True))
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return torch.ops.aten._softmax_backward_data(grad, result, -1, result.dtype)
