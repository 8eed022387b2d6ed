"""The DCNv3 layer of InternImage, with the published parameter names.

Axes: ``N`` batch, ``H W`` size, ``C`` channels, ``G`` groups, ``P`` points.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from the_mask.ops.dcn.op import dcnv3
from the_mask.ops.fast_linear import fast_linear
from the_mask.ops.inference import softmax_of_few
from the_mask.ops.linear import linear_in_float32


class _ToChannelsLast(nn.Module):
    """[N, C, H, W] to [N, H, W, C]; a layer, because it counts in the indices of published keys."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class DCNv3(nn.Module):
    """Deformable convolution v3 with its projections; keeps the size (stride 1, "same" padding).

    Args:
        channels: C.
        groups: G, divides C.
        kernel_size: kernel size of the sampling grid, odd.
        dw_kernel_size: kernel size of the depthwise convolution that predicts offsets and mask; None = ``kernel_size``.
        dilation: dilation of the sampling grid.
        offset_scale: see :func:`the_mask.ops.dcnv3`.
        center_feature_scale: mix in a predicted share of the projected input (InternImage-H and -G).
        remove_center: leave the centre tap out.

    Raises:
        ValueError: ``groups`` does not divide ``channels``, or the kernel is even and cannot keep the size.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        kernel_size: int = 3,
        dw_kernel_size: int | None = None,
        dilation: int = 1,
        offset_scale: float = 1.0,
        center_feature_scale: bool = False,
        remove_center: bool = False,
    ) -> None:
        super().__init__()
        dw_kernel_size = kernel_size if dw_kernel_size is None else dw_kernel_size
        if groups < 1 or channels % groups:
            raise ValueError(f"channels={channels} is not divisible by groups={groups}")
        if kernel_size % 2 == 0 or dw_kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}, dw_kernel_size={dw_kernel_size}: expected odd numbers")
        self.groups, self.kernel_size, self.dilation = groups, kernel_size, dilation
        self.padding = dilation * (kernel_size - 1) // 2
        self.offset_scale, self.remove_center = offset_scale, remove_center
        points = groups * (kernel_size * kernel_size - int(remove_center))
        self.dw_conv = nn.Sequential(
            nn.Conv2d(channels, channels, dw_kernel_size, padding=(dw_kernel_size - 1) // 2, groups=channels),
            nn.Sequential(_ToChannelsLast(), nn.LayerNorm(channels, eps=1e-6)),
            nn.GELU(),
        )
        self.offset = nn.Linear(channels, points * 2)
        self.mask = nn.Linear(channels, points)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.center_feature_scale = center_feature_scale
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(groups, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(groups))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as a plain average of the kernel's taps: no offsets, uniform mask."""
        for layer in (self.offset, self.mask):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.input_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, H, W, C] to [N, H, W, C]."""
        batch, height, width, _ = x.shape
        projected = self.input_proj(x)
        features = self.dw_conv(x.permute(0, 3, 1, 2))
        offset = linear_in_float32(self.offset, features)
        mask = self.mask(features).view(batch, height, width, self.groups, -1)
        mask = softmax_of_few(mask, offset.dtype).flatten(3)
        share = None
        if self.center_feature_scale:
            share = fast_linear(
                features, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
            ).sigmoid()
        output = dcnv3(
            projected,
            offset,
            mask,
            self.kernel_size,
            1,
            self.padding,
            self.dilation,
            self.groups,
            self.offset_scale,
            remove_center=self.remove_center,
            center_feature_scale=share,
        )
        return self.output_proj(output)
