"""InternImage-T ... G (arXiv:2211.05778): a convolutional pyramid whose core operator is DCNv3.

State-dict keys are those of the released checkpoints. Everything inside is channels last.
Axes: B images, h w feature size, C channels, G groups of a DCNv3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn

from the_mask.modeling.backbones.common import LEVELS, DropPath, PyramidBackbone, drop_path_rates, run_blocks
from the_mask.ops import DCNv3

NORM_EPS = 1e-6
# With extra norms, every sixth block of the third level is followed by one.
EXTRA_NORM_PERIOD = 6


@dataclass(frozen=True)
class InternImageVariant:
    """Options of a published size.

    Attributes:
        channels: C of the first level; it doubles at every level.
        depths: blocks of each level.
        group_channels: channels per DCNv3 group, at every level.
        drop_path: published stochastic depth for segmentation.
        offset_scale: scale of the whole DCNv3 sampling grid.
        layer_scale: branches end with a learned scale per channel.
        post_norm: norms come after the branches' operators instead of before.
        res_post_norm: norms come before and after them (only without ``layer_scale`` and ``post_norm``).
        dw_kernel: kernel of the depthwise convolution that predicts offsets and weights.
        center_feature_scale: DCNv3 blends its output with its unsampled input.
        extra_norms: norms inside the third level, every :data:`EXTRA_NORM_PERIOD` blocks.
    """

    channels: int
    depths: tuple[int, int, int, int]
    group_channels: int
    drop_path: float
    offset_scale: float = 1.0
    layer_scale: bool = True
    post_norm: bool = True
    res_post_norm: bool = False
    dw_kernel: int = 3
    center_feature_scale: bool = False
    extra_norms: bool = False

    def __post_init__(self) -> None:
        if self.res_post_norm and (self.layer_scale or self.post_norm):
            raise ValueError("InternImage: res_post_norm goes with neither layer_scale nor post_norm")
        if self.channels % self.group_channels:
            raise ValueError(
                f"MODEL.INTERNIMAGE.CHANNELS={self.channels}: must be a multiple of {self.group_channels}, "
                "the channels of one DCNv3 group of this variant"
            )
        if len(self.depths) != 4 or min(self.depths) < 1:
            raise ValueError(f"MODEL.INTERNIMAGE.DEPTHS={list(self.depths)}: must be four numbers >= 1")

    @property
    def level_norm(self) -> bool:
        """Whether the output of a level is normalised."""
        return not self.post_norm or self.center_feature_scale


VARIANTS = {
    "T": InternImageVariant(64, (4, 4, 18, 4), 16, 0.2, post_norm=False),
    "S": InternImageVariant(80, (4, 4, 21, 4), 16, 0.3),
    "B": InternImageVariant(112, (4, 4, 21, 4), 16, 0.4),
    "L": InternImageVariant(160, (5, 5, 22, 5), 16, 0.4, offset_scale=2.0),
    "XL": InternImageVariant(192, (5, 5, 24, 5), 16, 0.4, offset_scale=2.0),
    "H": InternImageVariant(
        320,
        (6, 6, 32, 6),
        32,
        0.5,
        layer_scale=False,
        post_norm=False,
        res_post_norm=True,
        dw_kernel=5,
        center_feature_scale=True,
        extra_norms=True,
    ),
    "G": InternImageVariant(
        512, (2, 2, 48, 4), 32, 0.5, layer_scale=False, dw_kernel=5, center_feature_scale=True, extra_norms=True
    ),
}


class ToChannelsLast(nn.Module):
    """[B,C,h,w] -> [B,h,w,C]. A module, because it counts in the indices of the released keys."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def to_channels_first(x: Tensor) -> Tensor:
    """[B,h,w,C] -> [B,C,h,w], a view."""
    return x.permute(0, 3, 1, 2)


def layer_norm(dim: int) -> nn.Sequential:
    """LayerNorm over the last axis; the released keys have it at index 0 of a sequence."""
    return nn.Sequential(nn.LayerNorm(dim, eps=NORM_EPS))


def channels_first_norm(dim: int) -> nn.Sequential:
    """[B,C,h,w] -> normalised [B,h,w,C]; the norm is at index 1 in the released keys."""
    return nn.Sequential(ToChannelsLast(), nn.LayerNorm(dim, eps=NORM_EPS))


class Stem(nn.Module):
    """Two strided convolutions: [B,3,H,W] -> [B,ceil(H/4),ceil(W/4),C]."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, dim // 2, 3, stride=2, padding=1)
        self.norm1 = channels_first_norm(dim // 2)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = channels_first_norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(to_channels_first(x)))


class Downsample(nn.Module):
    """[B,h,w,C] -> [B,ceil(h/2),ceil(w/2),2C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim * 2, 3, stride=2, padding=1, bias=False)
        self.norm = channels_first_norm(dim * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(to_channels_first(x)))


class MLP(nn.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim * ratio)
        self.fc2 = nn.Linear(dim * ratio, dim)
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class InternImageBlock(nn.Module):
    """Two residual branches on [B,h,w,C], DCNv3 and MLP, with the norms and scales of the variant.

    Args:
        dim: C.
        variant: the published size it belongs to.
        drop_path: stochastic depth of both branches.
        layer_scale: initial value of the scales, if the variant has them.
    """

    gamma1: Tensor | None
    gamma2: Tensor | None

    def __init__(self, dim: int, variant: InternImageVariant, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.post_norm, self.res_post_norm = variant.post_norm, variant.res_post_norm
        self.norm1 = layer_norm(dim)
        self.dcn = DCNv3(
            dim,
            groups=dim // variant.group_channels,
            kernel_size=3,
            offset_scale=variant.offset_scale,
            dw_kernel_size=variant.dw_kernel,
            center_feature_scale=variant.center_feature_scale,
        )
        self.norm2 = layer_norm(dim)
        self.mlp = MLP(dim)
        if variant.res_post_norm:
            self.res_post_norm1 = layer_norm(dim)
            self.res_post_norm2 = layer_norm(dim)
        for name in ("gamma1", "gamma2"):
            scale = nn.Parameter(torch.full((dim,), layer_scale)) if variant.layer_scale else None
            self.register_parameter(name, scale)
        self.drop_path = DropPath(drop_path)

    def _branch(self, x: Tensor, operator: nn.Module, norm: nn.Module, after: nn.Module | None) -> Tensor:
        y = norm(operator(x)) if self.post_norm else operator(norm(x))
        return y if after is None else after(y)

    def forward(self, x: Tensor) -> Tensor:
        after1, after2 = (self.res_post_norm1, self.res_post_norm2) if self.res_post_norm else (None, None)
        y = self._branch(x, self.dcn, self.norm1, after1)
        x = x + self.drop_path(y if self.gamma1 is None else y * self.gamma1)
        y = self._branch(x, self.mlp, self.norm2, after2)
        return x + self.drop_path(y if self.gamma2 is None else y * self.gamma2)


class InternImageLevel(nn.Module):
    """Blocks of one resolution, the norms between and after them, and the downsampling to the next level."""

    def __init__(
        self, index: int, variant: InternImageVariant, rates: list[float], layer_scale: float, recompute: bool
    ) -> None:
        super().__init__()
        dim = variant.channels * 2**index
        self.recompute = recompute
        self.blocks = nn.ModuleList(InternImageBlock(dim, variant, rate, layer_scale) for rate in rates)
        self.norm = layer_norm(dim) if variant.level_norm else nn.Identity()
        extra = len(rates) // EXTRA_NORM_PERIOD if variant.extra_norms and index == 2 else 0
        self.post_norms = nn.ModuleList(layer_norm(dim) for _ in range(extra))
        self.downsample = Downsample(dim) if index < 3 else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B,h,w,C] -> the level's output [B,h,w,C], and the next level's input (after the last level the output)."""
        recompute = self.recompute and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            x = run_blocks([block], x, recompute=recompute)
            norm, remainder = divmod(i + 1, EXTRA_NORM_PERIOD)
            if remainder == 0 and norm <= len(self.post_norms):
                x = self.post_norms[norm - 1](x)
        x = self.norm(x)
        return x, x if self.downsample is None else self.downsample(x)


class InternImage(PyramidBackbone):
    """InternImage: images [B,3,H,W] of any size -> ``res2`` ... ``res5`` at ceil(H/4), ceil(H/8), ...

    Args:
        variant: a published size, or any other combination.
        in_channels: channels of the images.
        drop_path: stochastic depth of the last block; ``None`` takes the variant's.
        layer_scale: initial layer scale of variants that have it: 1.0 for segmentation, 1e-5 for ImageNet.
        recompute: keep no activations inside blocks, compute them again in the backward pass.
        freeze_at: groups to freeze: 1 the stem, 2 also ``res2``, and so on.

    Raises:
        ValueError: ``drop_path`` or ``freeze_at`` out of range.
    """

    def __init__(
        self,
        variant: InternImageVariant,
        in_channels: int = 3,
        drop_path: float | None = None,
        layer_scale: float = 1.0,
        recompute: bool = False,
        freeze_at: int = 0,
    ) -> None:
        super().__init__([variant.channels * 2**i for i in range(4)])
        self.patch_embed = Stem(in_channels, variant.channels)
        rates = drop_path_rates(variant.depths, variant.drop_path if drop_path is None else drop_path)
        self.levels = nn.ModuleList(
            InternImageLevel(i, variant, rates[i], layer_scale, recompute) for i in range(len(LEVELS))
        )
        self.freeze_stages([[self.patch_embed], *([level] for level in self.levels)], freeze_at)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.patch_embed(x)
        features = {}
        for name, level in zip(LEVELS, self.levels, strict=True):
            feature, x = level(x)
            features[name] = to_channels_first(feature).contiguous()
        return features


@BACKBONE_REGISTRY.register()
def build_internimage_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> InternImage:
    """InternImage from ``MODEL.INTERNIMAGE`` and ``MODEL.BACKBONE.FREEZE_AT``.

    Raises:
        ValueError: unknown variant, or a size that fits no variant.
    """
    options = cfg.MODEL.INTERNIMAGE
    if options.VARIANT not in VARIANTS:
        raise ValueError(f"MODEL.INTERNIMAGE.VARIANT={options.VARIANT!r}: must be one of {', '.join(VARIANTS)}")
    variant = VARIANTS[options.VARIANT]
    variant = replace(
        variant, channels=options.CHANNELS or variant.channels, depths=tuple(options.DEPTHS) or variant.depths
    )
    return InternImage(
        variant,
        in_channels=input_shape.channels or 3,
        drop_path=options.DROP_PATH,
        layer_scale=options.LAYER_SCALE,
        recompute=options.CHECKPOINT,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
