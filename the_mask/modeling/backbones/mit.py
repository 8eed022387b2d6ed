"""MiT-B0 ... B5, the encoder of SegFormer (arXiv:2105.15203, section 3.1).

State-dict keys are those of the released ``mit_b*.pth``. Axes: B images, N = h*w tokens, C channels, R reduction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn

from the_mask.modeling.backbones.common import (
    LEVELS,
    DropPath,
    PyramidBackbone,
    drop_path_rates,
    init_transformer_weights,
    run_blocks,
)

# The released code gives block and stage norms this epsilon; patch-embedding and reduction norms keep PyTorch's 1e-5.
BLOCK_NORM_EPS = 1e-6
HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)


@dataclass(frozen=True)
class MiTVariant:
    """Channels and number of blocks of the four stages."""

    dims: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]


WIDE = (64, 128, 320, 512)
VARIANTS = {
    "B0": MiTVariant((32, 64, 160, 256), (2, 2, 2, 2)),
    "B1": MiTVariant(WIDE, (2, 2, 2, 2)),
    "B2": MiTVariant(WIDE, (3, 4, 6, 3)),
    "B3": MiTVariant(WIDE, (3, 4, 18, 3)),
    "B4": MiTVariant(WIDE, (3, 8, 27, 3)),
    "B5": MiTVariant(WIDE, (3, 6, 40, 3)),
}


def tokens_to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B,N,C] -> [B,C,h,w], a channels-last view without a copy."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def map_to_tokens(x: Tensor) -> Tensor:
    """[B,C,h,w] -> [B,N,C], a view."""
    return x.flatten(2).transpose(1, 2)


class OverlapPatchEmbed(nn.Module):
    """Strided convolution whose windows overlap, then a norm: [B,C',H,W] -> tokens [B,N,C] and their (h, w)."""

    def __init__(self, in_channels: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(x)
        return self.norm(map_to_tokens(x)), x.shape[2], x.shape[3]


class ReducedAttention(nn.Module):
    """Self-attention whose keys and values come from a map reduced R times per side (equation 2 of the paper)."""

    def __init__(self, dim: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, dim * 2)
        self.proj = nn.Linear(dim, dim)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, stride=reduction)
            self.norm = nn.LayerNorm(dim)

    def reduce(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens [B,N,C] -> [B,floor(h/R)*floor(w/R),C]; a side shorter than R is padded with zeros to R."""
        x = tokens_to_map(x, height, width)
        # The released code fails on such maps; with the padding there are keys to attend to at every input size.
        short = (0, max(0, self.reduction - width), 0, max(0, self.reduction - height))
        if any(short):
            x = F.pad(x, short)
        return self.norm(map_to_tokens(self.sr(x)))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        source = self.reduce(x, height, width) if self.reduction > 1 else x
        query = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.kv(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2))


class DepthwiseConv(nn.Module):
    """3x3 depthwise convolution on tokens; its zero padding carries the position (section 3.1, Mix-FFN)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return map_to_tokens(self.dwconv(tokens_to_map(x, height, width)))


class MixFFN(nn.Module):
    """fc1, depthwise convolution, GELU, fc2 (equation 3)."""

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim * ratio)
        self.dwconv = DepthwiseConv(dim * ratio)
        self.fc2 = nn.Linear(dim * ratio, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), height, width)))


class MiTBlock(nn.Module):
    """Pre-norm transformer block on tokens [B,N,C]."""

    def __init__(self, dim: int, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS)
        self.attn = ReducedAttention(dim, heads, reduction)
        self.norm2 = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS)
        self.mlp = MixFFN(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        return x + self.drop_path(self.mlp(self.norm2(x), height, width))


class MixTransformer(PyramidBackbone):
    """MiT encoder: images [B,3,H,W] of any size -> ``res2`` ... ``res5`` at ceil(H/4), ceil(H/8), ...

    Args:
        variant: one of :data:`VARIANTS`.
        in_channels: channels of the images.
        drop_path: stochastic depth of the last block, rising linearly from 0.
        recompute: keep no activations inside blocks, compute them again in the backward pass.
        freeze_at: groups to freeze: 1 the first patch embedding, 2 also the rest of ``res2``, and so on.

    Raises:
        ValueError: unknown variant, or ``drop_path`` or ``freeze_at`` out of range.
    """

    def __init__(
        self,
        variant: str = "B0",
        in_channels: int = 3,
        drop_path: float = 0.1,
        recompute: bool = False,
        freeze_at: int = 0,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"MODEL.MIT.VARIANT={variant!r}: must be one of {', '.join(VARIANTS)}")
        dims, depths = VARIANTS[variant].dims, VARIANTS[variant].depths
        super().__init__(dims)
        self.recompute = recompute
        rates = drop_path_rates(depths, drop_path)
        groups: list[list[nn.Module]] = [[]]
        for i, (dim, previous) in enumerate(zip(dims, (in_channels, *dims[:3]))):
            kernel, stride = (7, 4) if i == 0 else (3, 2)
            blocks = [MiTBlock(dim, HEADS[i], REDUCTIONS[i], rate) for rate in rates[i]]
            stage = [
                OverlapPatchEmbed(previous, dim, kernel, stride),
                nn.ModuleList(blocks),
                nn.LayerNorm(dim, eps=BLOCK_NORM_EPS),
            ]
            for name, module in zip(("patch_embed", "block", "norm"), stage):
                self.add_module(f"{name}{i + 1}", module)
            groups.append(stage)
        # The first patch embedding is what Detectron2 calls the stem.
        groups[0].append(groups[1].pop(0))
        self.apply(init_transformer_weights)
        self.freeze_stages(groups, freeze_at)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = {}
        for i, level in enumerate(LEVELS, start=1):
            tokens, height, width = getattr(self, f"patch_embed{i}")(x)
            tokens = run_blocks(getattr(self, f"block{i}"), tokens, height, width, recompute=self._recomputes())
            x = tokens_to_map(getattr(self, f"norm{i}")(tokens), height, width).contiguous()
            features[level] = x
        return features

    def _recomputes(self) -> bool:
        return self.recompute and torch.is_grad_enabled()


@BACKBONE_REGISTRY.register()
def build_mit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MixTransformer:
    """MiT from ``MODEL.MIT`` and ``MODEL.BACKBONE.FREEZE_AT``."""
    return MixTransformer(
        cfg.MODEL.MIT.VARIANT,
        in_channels=input_shape.channels or 3,
        drop_path=cfg.MODEL.MIT.DROP_PATH,
        recompute=cfg.MODEL.MIT.CHECKPOINT,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
