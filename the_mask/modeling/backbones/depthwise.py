"""Depthwise convolutions whose weight gradient stays fast in bfloat16 on a CPU.

oneDNN has fast bfloat16 kernels for every layer of a mobile network except one: the weight gradient of depthwise
kernels larger than 3x3 runs in a scalar loop, which takes half of a training step. Here that gradient is computed in
float32 from bfloat16 operands, which is faster and more accurate. Parameters, keys and results of the forward pass are
those of the plain layers. Axes: B images, C channels, H W map, k kernel side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _MixedGradient(torch.autograd.Function):
    """Depthwise convolution [B,C,H,W] in the dtype of ``x``; the weight and its gradient are float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
        low = weight.to(x.dtype)
        ctx.save_for_backward(x, low)
        ctx.geometry = (stride, padding)
        return F.conv2d(x, low, None, stride, padding, 1, x.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        stride, padding = ctx.geometry
        for_x, for_weight = ctx.needs_input_grad[:2]

        def gradients(cast: torch.dtype, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
            operands = (tensor.to(cast) for tensor in (grad, x, weight))
            return torch.ops.aten.convolution_backward(
                *operands, None, stride, padding, [1, 1], False, [0, 0], x.shape[1], mask
            )

        grad_x = gradients(x.dtype, [True, False, False])[0] if for_x else None
        grad_weight = gradients(torch.float32, [False, True, False])[1] if for_weight else None
        return grad_x, grad_weight, None, None


def _wants_mixed(x: Tensor) -> bool:
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.device.type == "cpu" and autocast and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _Depthwise(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if not _wants_mixed(x):
            return super().forward(x)
        return _MixedGradient.apply(x.bfloat16(), self.weight, [*self.stride], [*self.padding])


class SameConv2d(nn.Conv2d):
    """Convolution padded like TensorFlow's "SAME": an output for every stride, the odd row and column at the end."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self._padding(x.shape[-2 + i], i) for i in (0, 1))
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(x)

    def _padding(self, size: int, i: int) -> int:
        reach = (self.kernel_size[i] - 1) * self.dilation[i]
        return max(reach - (size - 1) % self.stride[i], 0)


class _DepthwiseSame(SameConv2d, _Depthwise):
    pass


def speed_up_depthwise(model: nn.Module, same: type[nn.Conv2d] = SameConv2d) -> None:
    """Replace, in place, the depthwise layers of a model whose weight gradient would be slow.

    Args:
        model: any model.
        same: the class of its convolutions with TensorFlow's padding; timm has its own.
    """
    fast: dict[type[nn.Module], type[nn.Conv2d]] = {nn.Conv2d: _Depthwise, same: _DepthwiseSame}
    for module in model.modules():
        if type(module) not in fast or not isinstance(module, nn.Conv2d):
            continue
        depthwise = module.groups == module.in_channels == module.out_channels > 1
        plain = module.bias is None and module.dilation == (1, 1) and module.padding_mode == "zeros"
        if depthwise and plain and not isinstance(module.padding, str) and max(module.kernel_size) > 3:
            module.__class__ = fast[type(module)]
