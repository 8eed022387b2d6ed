"""Layers of a segmentor that run faster on a CPU."""

from __future__ import annotations

from detectron2.layers import Conv2d
from torch import Tensor, nn

from the_mask.ops.fast_linear import FastConv2d, FastLinear, is_pointwise


class FastConvNorm2d(FastConv2d, Conv2d):
    """Detectron2's convolution with norm and activation, for 1x1 kernels."""

    def forward(self, x: Tensor) -> Tensor:
        x = self._conv_forward(x, self.weight, self.bias)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


FAST: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FastLinear, nn.Conv2d: FastConv2d, Conv2d: FastConvNorm2d}


def speed_up_layers(module: nn.Module) -> None:
    """Replace the linear layers and 1x1 convolutions in a module by fast ones, in place; names and weights stay."""
    for layer in module.modules():
        fast = FAST.get(type(layer))
        if fast is not None and (not isinstance(layer, nn.Conv2d) or is_pointwise(layer)):
            layer.__class__ = fast
