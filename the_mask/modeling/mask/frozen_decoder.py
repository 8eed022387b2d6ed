"""Decoder for a frozen encoder: joins its levels into tokens, then runs transformer blocks that see the queries.

On the outputs of a frozen DINOv2 or DINOv3 this is PMT (arXiv:2603.25398); the maps of any other backbone are
resampled to one grid first. Only this part trains, so the features can be cached (``MODEL.FROZEN_FEATURES``).

Axes: N images, D width, C channels of a level, P prefix tokens, h w cells per side of the grid, S = P + h*w tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.config.keys.encoder import FrozenDecoderOptions

if TYPE_CHECKING:
    from the_mask.modeling.backbones.plain_vit import Tokens

GRID_STRIDE = 16
ROPE_BASE = 100.0


class Level(nn.Module):
    """One level's tokens [N, S, C] -> [N, S, D]: BatchNorm, x + MLP(x), a learned scale per channel.

    The MLP is C -> D/2 -> GELU -> D; where C is not D, x goes through a linear layer of its own.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.skip = nn.Identity() if channels == width else nn.Linear(channels, width)
        self.mlp = nn.Sequential(nn.Linear(channels, width // 2), nn.GELU(), nn.Linear(width // 2, width))
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.scale * (self.skip(x) + self.mlp(x))


class FrozenDecoder(nn.Module):
    """Levels of a frozen encoder, and blocks with queries.

    Args:
        channels: C of each level.
        num_queries: tokens in front of the others in the blocks.
        num_prefix_tokens: P of the levels.
        options: of the decoder; its width D must be a multiple of 4 times its heads.

    Raises:
        ValueError: a width that does not divide by 4 times ``heads``.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_queries: int,
        num_prefix_tokens: int = 0,
        options: FrozenDecoderOptions = FrozenDecoderOptions(),
    ) -> None:
        super().__init__()
        from timm.layers import LayerNorm
        from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
        from timm.models.eva import EvaBlock

        from the_mask.modeling.backbones.plain_vit import fuse_gelu

        width, heads = options.width or channels[-1], options.heads
        if width % (4 * heads):
            raise ValueError(
                f"MODEL.ENCODER.FROZEN.WIDTH {width} and HEADS {heads}: rotary positions need a width that is a "
                f"multiple of {4 * heads}, 4 per head"
            )
        self.num_prefix_tokens = num_prefix_tokens
        self.width = width
        self.levels = nn.ModuleList(Level(c, width) for c in channels)
        self.blocks = nn.ModuleList(
            EvaBlock(
                width,
                heads,
                qkv_bias=True,
                mlp_ratio=options.hidden / width,
                num_prefix_tokens=num_queries + num_prefix_tokens,
                rotate_half=True,
                init_values=options.layer_scale,
                norm_layer=LayerNorm,
            )
            for _ in range(options.blocks)
        )
        fuse_gelu(self.blocks)
        self.rope = RotaryEmbeddingDinoV3(width // heads, temperature=ROPE_BASE, rotate_half=True)
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def join(self, features: Mapping[str, Tensor], grid: tuple[int, int]) -> Tokens:
        """Sum of the levels.

        Args:
            features: levels of one encoder, in order: tokens [N, P + h*w, C], or maps [N, C, ., .] of any strides.
            grid: (h, w).
        """
        from the_mask.modeling.backbones.plain_vit import Tokens

        levels = [level(_tokens(x, grid)) for level, x in zip(self.levels, features.values(), strict=True)]
        rotation = self.rope.get_embed(shape=list(grid)).to(levels[0].device)
        return Tokens(torch.stack(levels).sum(0), grid, rotation)


def _tokens(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens as they are; a map [N, C, ., .] as tokens of a grid."""
    if x.ndim == 3:
        return x
    if x.shape[-2] > grid[0]:
        x = F.adaptive_avg_pool2d(x, grid)
    elif tuple(x.shape[-2:]) != grid:
        x = F.interpolate(x, size=grid, mode="bilinear", align_corners=False)
    return x.flatten(2).transpose(1, 2)


def build_frozen_decoder(options: FrozenDecoderOptions, backbone: Any, num_queries: int) -> FrozenDecoder:
    """The decoder of ``MODEL.ENCODER.FROZEN`` for a backbone."""
    shapes = backbone.output_shape()
    channels = [shape.channels for shape in shapes.values()]
    prefix = getattr(backbone, "num_prefix_tokens", 0)
    return FrozenDecoder(channels, num_queries, prefix, options)
