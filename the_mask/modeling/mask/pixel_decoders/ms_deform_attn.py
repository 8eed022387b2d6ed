"""Multi-scale deformable pixel decoder of Mask2Former and THE-Mask (spec section 4).

Axes: N frames, C channels, h w feature size, L levels, S tokens of all levels together, P points.
State-dict keys are those of the official Detectron2 Mask2Former.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.config.keys.mask_former import PixelDecoderOptions
from the_mask.modeling.mask.pixel_decoders.registry import PIXEL_DECODERS, PixelDecoder
from the_mask.modeling.mask.position_encoding import sine_2d
from the_mask.ops import MSDeformAttn
from the_mask.ops.inference import is_plain

NORM_GROUPS = 32


def cell_centres(spatial_shapes: Sequence[tuple[int, int]], device: torch.device | None = None) -> Tensor:
    """Return the centre of every cell of every level as (x, y) in 0..1, levels one after the other: [S, 2] float32."""
    centres = []
    for height, width in spatial_shapes:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        centres.append(torch.stack((grid_x, grid_y), dim=2).flatten(0, 1))
    return torch.cat(centres)


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each followed by residual and LayerNorm."""

    def __init__(self, dim: int, feedforward: int, levels: int, heads: int, points: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.self_attn = MSDeformAttn(dim, levels, heads, points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, feedforward)
        self.linear2 = nn.Linear(feedforward, dim)
        self.norm2 = nn.LayerNorm(dim)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(
        self, tokens: Tensor, position: Tensor, reference: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Map tokens [N,S,C], position [S,C], reference [N,S,L,2] to tokens [N,S,C]; position is on queries only."""
        attended = self.self_attn(tokens + position, reference, tokens, spatial_shapes)
        tokens = self.norm1(tokens + self._drop(attended))
        hidden = self._drop(F.relu_(self.linear1(tokens)))
        return self.norm2(tokens + self._drop(self.linear2(hidden)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class DeformableEncoder(nn.Module):
    """A stack of encoder layers over the tokens of all levels."""

    def __init__(self, layers: Sequence[DeformableEncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self, tokens: Tensor, position: Tensor, reference: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        if is_plain(tokens):
            # The same for all frames and layers.
            first: Any = self.layers[0]
            reference = first.self_attn.spread(reference[:1])
        for layer in self.layers:
            tokens = layer(tokens, position, reference, spatial_shapes)
        return tokens


class DeformableTransformer(nn.Module):
    """Adds position and level encodings to the maps and runs the encoder on their tokens."""

    def __init__(
        self, dim: int, feedforward: int, levels: int, heads: int, points: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(levels, dim))
        self.encoder = DeformableEncoder(
            [DeformableEncoderLayer(dim, feedforward, levels, heads, points, dropout) for _ in range(layers)]
        )
        nn.init.normal_(self.level_embed)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map L tensors [N,C,h_l,w_l] to L tensors of the same shapes."""
        frames, channels = maps[0].shape[:2]
        device = maps[0].device
        shapes = [(x.shape[2], x.shape[3]) for x in maps]
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        position = torch.cat(
            [
                sine_2d(height, width, channels, device).flatten(1).t() + self.level_embed[level]
                for level, (height, width) in enumerate(shapes)
            ]
        )
        reference = cell_centres(shapes, device)[None, :, None].expand(frames, -1, len(shapes), -1)
        tokens = self.encoder(tokens, position, reference, shapes)
        parts = tokens.split([height * width for height, width in shapes], dim=1)
        return [
            # Contiguous for a single frame too: resizing and adding such a view takes three times as long.
            part.transpose(1, 2).reshape(frames, channels, height, width).contiguous()
            for part, (height, width) in zip(parts, shapes, strict=True)
        ]


@PIXEL_DECODERS.register()
class MSDeformAttnPixelDecoder(PixelDecoder):
    """Deformable encoder on the coarse maps, one FPN step per finer map, and a 1x1 convolution to the mask features.

    Source: Mask2Former, section 3.2.1 and released code; sizes from ``MODEL.SEM_SEG_HEAD``.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        options: PixelDecoderOptions = PixelDecoderOptions(),
        dropout: float = 0.0,
    ) -> None:
        """
        Raises:
            ValueError: a feature that the backbone does not have, or a size that does not divide; names the config key.
        """
        super().__init__()
        transformer_in_features = options.deformable_transformer_encoder_in_features
        conv_dim, norm, heads = options.convs_dim, options.norm, options.transformer_enc_nheads
        _check_features(input_shape, options.in_features, transformer_in_features)
        strides = {name: shape.stride or 1 for name, shape in input_shape.items()}
        channels = {name: shape.channels or 0 for name, shape in input_shape.items()}
        if conv_dim % NORM_GROUPS:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.CONVS_DIM is {conv_dim}; GroupNorm needs a multiple of {NORM_GROUPS} channels"
            )
        if conv_dim % heads:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.CONVS_DIM ({conv_dim}) must be a multiple of"
                f" MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_NHEADS ({heads})"
            )
        # Coarsest first, the order of input_proj in the official checkpoints.
        self.transformer_in_features = sorted(transformer_in_features, key=strides.__getitem__, reverse=True)
        self.out_strides = [strides[f] for f in self.transformer_in_features]
        self.out_channels = [conv_dim] * len(self.out_strides)
        finest = self.out_strides[-1]
        self.fpn_in_features = sorted(
            (f for f in options.in_features if options.common_stride <= strides[f] < finest), key=strides.__getitem__
        )
        self.mask_stride = min([finest, *(strides[f] for f in self.fpn_in_features)])

        self.input_proj = nn.ModuleList(_projection(channels[f], conv_dim) for f in self.transformer_in_features)
        self.transformer = DeformableTransformer(
            conv_dim,
            options.transformer_enc_dim_feedforward,
            len(self.out_strides),
            heads,
            options.deformable_transformer_encoder_n_points,
            options.transformer_enc_layers,
            dropout,
        )
        self.mask_features = _caffe2_init(nn.Conv2d(conv_dim, options.mask_dim, 1))
        for number, feature in enumerate(self.fpn_in_features, start=1):
            bias = norm == ""
            adapter = Conv2d(channels[feature], conv_dim, 1, bias=bias, norm=get_norm(norm, conv_dim))
            layer = Conv2d(
                conv_dim, conv_dim, 3, padding=1, bias=bias, norm=get_norm(norm, conv_dim), activation=F.relu_
            )
            self.add_module(f"adapter_{number}", _caffe2_init(adapter))
            self.add_module(f"layer_{number}", _caffe2_init(layer))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        return {
            "input_shape": input_shape,
            "options": PixelDecoderOptions.from_config(cfg),
            "dropout": cfg.MODEL.MASK_FORMER.DROPOUT,
        }

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode the backbone's maps.

        Args:
            features: maps [N, C_f, h_f, w_f] by name.

        Returns:
            mask_features [N, MASK_DIM, h, w] at ``mask_stride``, and the maps [N, CONVS_DIM, h_l, w_l] at
            ``out_strides``, coarsest first.
        """
        maps = self.transformer(
            [proj(features[f]) for proj, f in zip(self.input_proj, self.transformer_in_features, strict=True)]
        )
        fine = maps[-1]
        for number in range(len(self.fpn_in_features), 0, -1):
            lateral = self.get_submodule(f"adapter_{number}")(features[self.fpn_in_features[number - 1]])
            fine = lateral + F.interpolate(fine, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
            fine = self.get_submodule(f"layer_{number}")(fine)
        return self.mask_features(fine), maps


def _projection(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 1)
    nn.init.xavier_uniform_(conv.weight, gain=1)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(NORM_GROUPS, out_channels))


def _caffe2_init(conv: nn.Conv2d) -> nn.Conv2d:
    """Initialise as Detectron2's ``c2_xavier_fill``: Kaiming uniform with a = 1, zero bias."""
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _check_features(
    input_shape: Mapping[str, ShapeSpec], in_features: Sequence[str], transformer_in_features: Sequence[str]
) -> None:
    keys = {
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": in_features,
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": transformer_in_features,
    }
    for key, names in keys.items():
        missing = [name for name in names if name not in input_shape]
        if missing or not names:
            raise ValueError(f"{key} is {list(names)}; the backbone gives {list(input_shape)}")
