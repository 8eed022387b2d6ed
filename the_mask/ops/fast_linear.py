"""Linear layers of inference on a CPU by oneDNN where the BLAS is slow.

PyTorch gives float32 products to its BLAS, MKL in the usual builds, which runs on AMD's processors at about half the
speed of oneDNN (measured: docs/experiments.md). oneDNN is in the same builds, behind an operator that torch.compile
uses. Results differ from the BLAS's by rounding. ``THE_MASK_LINEAR=auto|onednn|blas`` forces the choice; ``auto`` takes
oneDNN on AMD only. With gradients, on other devices, in other precisions and in traced programs the usual layer runs.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHOICES = ("auto", "onednn", "blas")


@cache
def uses_onednn(choice: str | None = None) -> bool:
    """Whether the fast path is taken on this machine; ``choice`` is that of ``THE_MASK_LINEAR`` by default.

    Raises:
        ValueError: an unknown choice, or oneDNN is asked for and this PyTorch has it not.
    """
    choice = os.environ.get("THE_MASK_LINEAR", "auto") if choice is None else choice
    if choice not in CHOICES:
        raise ValueError(f"THE_MASK_LINEAR={choice!r}: expected one of {', '.join(CHOICES)}")
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if choice == "onednn" and not available:
        raise ValueError("THE_MASK_LINEAR=onednn: this PyTorch was built without oneDNN; use auto or blas")
    return available and (choice == "onednn" or (choice == "auto" and is_amd()))


def is_amd() -> bool:
    """Whether the processor is AMD's, as far as the system tells."""
    information = Path("/proc/cpuinfo")
    return information.exists() and "AuthenticAMD" in information.read_text()


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: x [..., K], weight [N, K], bias [N] -> [..., N]."""
    plain = (
        x.device.type != "cpu"
        or not x.dtype == weight.dtype == torch.float32
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or not x.numel()
        or not uses_onednn()
    )
    if plain:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class FastLinear(nn.Linear):
    """A linear layer that takes the fast path where there is one."""

    def forward(self, input: Tensor) -> Tensor:
        return fast_linear(input, self.weight, self.bias)


def speed_up_linears(module: nn.Module) -> None:
    """Make the linear layers inside a module fast ones, in place; names, weights and results stay."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FastLinear
