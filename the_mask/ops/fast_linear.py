"""Linear layers and 1x1 convolutions for CPUs that use oneDNN where the BLAS is slow.

PyTorch computes float32 products with its BLAS, in the usual builds MKL, which runs at about half the speed of oneDNN
on AMD processors (measured: docs/experiments.md). oneDNN is in the same builds, through an operator that torch.compile
uses. Results differ from the BLAS's by rounding. ``THE_MASK_LINEAR=auto|onednn|blas`` chooses; ``auto`` takes oneDNN on
AMD only. On other devices, in other precisions, in traced programs, with standard operators
(:func:`the_mask.ops.decomposed`) and for small products, the usual layer runs.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.ops.inference import is_plain, is_plain_inference

CHOICES = ("auto", "onednn", "blas")
# Multiply-adds from which oneDNN is the faster one. A call costs 10 us more than the BLAS's, a convolution 30, and so
# does a layer of Python in the graph of gradients.
LEAST_PRODUCT = 1 << 20
LEAST_CONVOLUTION = LEAST_TRAINED = 1 << 22


@cache
def uses_onednn(choice: str | None = None) -> bool:
    """Whether the fast path is used on this machine; ``choice`` defaults to ``THE_MASK_LINEAR``.

    Raises:
        ValueError: an unknown choice, or "onednn" with a PyTorch that does not have it.
    """
    choice = os.environ.get("THE_MASK_LINEAR", "auto") if choice is None else choice
    if choice not in CHOICES:
        raise ValueError(f"THE_MASK_LINEAR={choice!r}: expected one of {', '.join(CHOICES)}")
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if choice == "onednn" and not available:
        raise ValueError("THE_MASK_LINEAR=onednn: this PyTorch was built without oneDNN; use auto or blas")
    return available and (choice == "onednn" or (choice == "auto" and is_amd()))


def is_amd() -> bool:
    """Whether the processor is by AMD, according to the system."""
    information = Path("/proc/cpuinfo")
    return information.exists() and "AuthenticAMD" in information.read_text()


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """``F.linear``, then ``F.gelu`` if asked for: x [..., K], weight [N, K], bias [N] -> [..., N]."""
    size = 0 if _captured() else x.numel() * weight.shape[0]
    if size >= LEAST_PRODUCT and _fast(x, weight):
        # The GELU is in the same pass over the result.
        return _by_onednn(x, weight, bias, "gelu" if gelu else "none")
    if size >= LEAST_TRAINED and _wants_gradients(x, weight, bias):
        # Not a view: the gradient of changing one in place (``relu_``) copies the whole of it three times.
        shape = (*x.shape[:-1], weight.shape[0])
        x = torch.ops.aten._unsafe_view(_Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias), shape)
    else:
        x = F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "none")


class _Linear(torch.autograd.Function):
    """:func:`fast_linear` with gradients, which are linear layers too. x [M, K], weight [N, K], bias [N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        grad_x = fast_linear(grad, weight.t()) if for_x else None
        grad_weight = None
        if for_weight:
            # The first factor is copied to be contiguous: the narrower of the two.
            narrow = grad.shape[1] <= x.shape[1]
            grad_weight = fast_linear(grad.t(), x.t()) if narrow else fast_linear(x.t(), grad.t()).t()
        return grad_x, grad_weight, grad.sum(0) if for_bias else None


class _Product(torch.autograd.Function):
    """:func:`fast_product` with gradients. a [..., M, K], b [..., K, N], ``batch``: their common leading axes."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, batch: torch.Size) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.batch = batch
        return _stacked([_by_onednn(x.contiguous(), y.t(), None) for x, y in _pairs(a, b, batch)], batch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            parts = [fast_linear(g, y) for g, y in _pairs(grad, b, ctx.batch)]
            # A matrix shared by the batch has one gradient: no stack of them.
            grad_a = sum(parts[1:], parts[0]) if a.dim() == 2 else _stacked(parts, ctx.batch).sum_to_size(a.shape)
        if ctx.needs_input_grad[1]:
            parts = [fast_linear(x.t(), g.t()) for x, g in _pairs(a, grad, ctx.batch)]
            grad_b = _stacked(parts, ctx.batch).sum_to_size(b.shape)
        return grad_a, grad_b, None


def _pairs(a: Tensor, b: Tensor, batch: torch.Size) -> Iterator[tuple[Tensor, Tensor]]:
    """The matrices of two batches, broadcast without a copy."""
    many = [x.expand(*batch, *x.shape[-2:]) for x in (a, b)]
    return ((many[0][index], many[1][index]) for index in itertools.product(*map(range, batch)))


def _stacked(products: list[Tensor], batch: torch.Size) -> Tensor:
    whole = products[0][None] if len(products) == 1 else torch.stack(products)
    return whole.view(*batch, *whole.shape[-2:])


def _wants_gradients(*tensors: Tensor | None) -> bool:
    given = [x for x in tensors if x is not None]
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in given)):
        return False
    # Sharded tensors and other subclasses have their own products.
    return all(type(x) in (Tensor, nn.Parameter) for x in given) and is_plain(*given) and uses_onednn()


def fast_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``: a [..., M, K], b [..., K, N] -> [..., M, N], leading axes broadcast."""
    size = 0 if _captured() else a.shape[-2] * b.shape[-2] * b.shape[-1]
    if not (size >= LEAST_TRAINED and _wants_gradients(a, b)) and not (size >= LEAST_PRODUCT and _fast(a, b)):
        return a @ b
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    product: Tensor = _Product.apply(a, b, batch)
    return product


def _captured() -> bool:
    # Then sizes may be symbols, and comparing them would tie the program to sizes on one side.
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _fast(x: Tensor, weight: Tensor) -> bool:
    return is_plain_inference(x, weight) and uses_onednn()


class FastLinear(nn.Linear):
    """A linear layer that uses the fast path where possible."""

    def forward(self, input: Tensor) -> Tensor:
        return fast_linear(input, self.weight, self.bias)


class FastConv2d(nn.Conv2d):
    """A 1x1 convolution that uses oneDNN in one thread too, where PyTorch takes the BLAS; in training, a product."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        size = 0 if _captured() or input.dim() != 4 else input.numel() * weight.shape[0]
        if size >= LEAST_TRAINED and _wants_gradients(input, weight, bias):
            return _trained_pointwise(input, weight, bias)
        if size < LEAST_CONVOLUTION or torch.get_num_threads() > 1 or not _fast(input, weight):
            return super()._conv_forward(input, weight, bias)
        return torch.mkldnn_convolution(input, weight, bias, [0, 0], [1, 1], [1, 1], 1)


def _trained_pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution with gradients, in the layout of x: [N, K, H, W] -> [N, M, H, W]."""
    matrix = weight.flatten(1)
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return fast_linear(x.permute(0, 2, 3, 1), matrix, bias).permute(0, 3, 1, 2)
    product = fast_product(matrix, x.flatten(2))
    if bias is not None:
        product = product + bias[:, None]
    return torch.ops.aten._unsafe_view(product, (x.shape[0], -1, *x.shape[2:]))


def is_pointwise(layer: nn.Conv2d) -> bool:
    """Whether a convolution is one matrix product over its channels."""
    return (layer.kernel_size, layer.stride, layer.padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1)
