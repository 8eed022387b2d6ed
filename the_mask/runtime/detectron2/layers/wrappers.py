"""PyTorch layers under the names that Detectron2 code imports, and ``Conv2d`` with norm and activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BatchNorm2d = nn.BatchNorm2d
ConvTranspose2d = nn.ConvTranspose2d
Linear = nn.Linear
interpolate = F.interpolate


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` followed by an optional norm and an optional activation."""

    norm: nn.Module | None
    activation: Callable[[Tensor], Tensor] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of ``nn.Conv2d`` and the keywords ``norm`` (module) and ``activation`` (callable)."""
        norm = kwargs.pop("norm", None)
        activation = kwargs.pop("activation", None)
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


def cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """``torch.cat`` that returns a single tensor without a copy."""
    assert isinstance(tensors, (list, tuple))
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
