"""The multi-scale deformable attention layer (Deformable DETR, sec. 4.1), with the published parameter names.

Axes: ``N`` batch, ``S`` positions of all levels, ``C`` channels, ``Q`` queries, ``L`` levels, ``M`` heads,
``P`` points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from the_mask.ops.fast_linear import fast_linear
from the_mask.ops.inference import is_plain, softmax_of_few
from the_mask.ops.linear import linear_in_float32
from the_mask.ops.msda.op import ms_deform_attn


class MSDeformAttn(nn.Module):
    """Each query attends to ``num_levels * num_points`` sampled positions per head.

    Args:
        embed_dim: channels C of queries, values and output.
        num_levels, num_heads, num_points: L, M, P.

    Raises:
        ValueError: ``embed_dim`` is not divisible by ``num_heads``.
    """

    def __init__(self, embed_dim: int = 256, num_levels: int = 4, num_heads: int = 8, num_points: int = 4) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} is not divisible by num_heads={num_heads}")
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(embed_dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise offsets on rays, one direction per head, point p at distance p + 1; attention is uniform."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        rays = torch.stack((angles.cos(), angles.sin()), dim=-1)
        rays = rays / rays.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        bias = rays[:, None, None, :] * steps[None, None, :, None]
        bias = bias.expand(self.num_heads, self.num_levels, self.num_points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.reshape(-1))
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value_input: Tensor,
        spatial_shapes: Tensor | Sequence[Sequence[int]],
        level_start_index: Tensor | Sequence[int] | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [N, Q, C].
            reference_points: [N, Q, L, 2], (x, y) in 0..1, or [N, Q, L, 4], (x, y, w, h) in 0..1; or what
                :meth:`spread` made of them.
            value_input: [N, S, C], levels concatenated.
            spatial_shapes: L pairs (H, W); a list keeps the shapes on the host, which avoids synchronisation.
            level_start_index: [L] or None.
            padding_mask: [N, S], True at padding, whose value is set to zero.

        Returns:
            [N, Q, C].

        Raises:
            ValueError: sizes that do not fit; the message names them.
        """
        batch, queries, channels = query.shape
        sizes = (self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(value_input)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0)
        value = value.view(batch, -1, self.num_heads, channels // self.num_heads)
        locations = self._locations(query, reference_points, spatial_shapes)
        weights = self.attention_weights(query).view(batch, queries, self.num_heads, -1)
        weights = softmax_of_few(weights, locations.dtype).view(batch, queries, *sizes)
        attended = ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights)
        return self.output_proj(attended)

    def spread(self, reference_points: Tensor) -> Tensor:
        """Reference points [N, Q, L, 2] for each head and point, [N, Q, M, L, P, 2]: for layers that share them."""
        shape = (-1, -1, self.num_heads, -1, self.num_points, -1)
        return reference_points[:, :, None, :, None, :].expand(shape).contiguous()

    def _locations(
        self, query: Tensor, reference_points: Tensor, spatial_shapes: Tensor | Sequence[Sequence[int]]
    ) -> Tensor:
        """Sampling locations [N, Q, M, L, P, 2], (x, y) in 0..1."""
        layer, sizes = self.sampling_offsets, (self.num_heads, self.num_levels, self.num_points, 2)
        shape = (*query.shape[:2], *sizes)
        is_spread = reference_points.dim() == 6
        if is_spread and is_plain(query, layer.weight):
            # Divided in the weights: a division by two numbers in turn takes longer than the sampling.
            scale = (1 / _level_extent(spatial_shapes, query)).expand(sizes).reshape(-1)
            shifts = fast_linear(query, layer.weight * scale[:, None], layer.bias * scale).view(shape)
            # In place without gradients: that of a view changed in place is slow.
            return shifts + reference_points if shifts.requires_grad else shifts.add_(reference_points)
        offsets = linear_in_float32(layer, query).view(shape)
        places = reference_points.to(offsets.dtype)
        places = places if is_spread else places[:, :, None, :, None, :]
        if reference_points.shape[-1] == 2:
            return places + offsets / _level_extent(spatial_shapes, offsets)
        if reference_points.shape[-1] == 4:
            return places[..., :2] + offsets / self.num_points * places[..., 2:] * 0.5
        raise ValueError(f"reference_points has shape {tuple(reference_points.shape)}: expected 2 or 4 as last size")


def _level_extent(spatial_shapes: Tensor | Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """(W, H) of each level as [L, 1, 2], on the device of ``like``."""
    if isinstance(spatial_shapes, Tensor):
        extent = spatial_shapes.to(like).flip(-1)
    else:
        # One fill per number: a tensor made from a list would fix sizes that an exporter keeps dynamic.
        sides = [side for height, width in spatial_shapes for side in (width, height)]
        extent = torch.stack([like.new_full((), side) for side in sides]).view(-1, 2)
    return extent[:, None, :]
