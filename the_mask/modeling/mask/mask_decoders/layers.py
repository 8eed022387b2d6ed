"""Attention and feed-forward layers of the mask decoders.

Axes: N sequences, Q queries, S tokens, C channels. Everything is batch first. Parameter names are those of
``torch.nn.MultiheadAttention`` and of the official Mask2Former, so that its checkpoints load by name.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.ops.fast_linear import fast_linear


class MultiheadAttention(nn.Module):
    """Multi-head attention with the parameters of ``torch.nn.MultiheadAttention``.

    The torch module takes one mask per head and has a fast path that exporters cannot handle. This one is three
    projections around ``scaled_dot_product_attention``, with a mask shared by the heads.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(
                f"MODEL.MASK_FORMER.HIDDEN_DIM ({dim}) must be a multiple of MODEL.MASK_FORMER.NHEADS ({heads})"
            )
        self.heads = heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        # Xavier's bound is that of the packed matrix, as in torch.nn.MultiheadAttention.
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            query: [N, Q, C]. key, value: [N, S, C].
            allowed: bool [N, Q, S], True where a query may attend; ``None`` allows all. A row without any True gives
                NaN: see :func:`unblock_empty_rows`.

        Returns:
            [N, Q, C].
        """
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        q, k, v = (
            fast_linear(x, weight, bias).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        dropout = self.dropout if self.training else 0.0
        mask = None if allowed is None else allowed[:, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class SelfAttentionLayer(nn.Module):
    """Self-attention over the queries, residual and LayerNorm (first when ``pre_norm``)."""

    def __init__(self, dim: int, heads: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(dim, heads, dropout)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, queries: Tensor, query_position: Tensor) -> Tensor:
        """Map queries [N,Q,C] with positions [Q,C] (added to query and key) to [N,Q,C]."""
        x = self.norm(queries) if self.pre_norm else queries
        located = x + query_position
        queries = queries + self.dropout(self.self_attn(located, located, x))
        return queries if self.pre_norm else self.norm(queries)


class CrossAttentionLayer(nn.Module):
    """Masked attention from the queries to the tokens of a map, residual and LayerNorm (first when ``pre_norm``)."""

    def __init__(self, dim: int, heads: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.multihead_attn = MultiheadAttention(dim, heads, dropout)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, queries: Tensor, query_position: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
        """Map queries [N,Q,C] with positions [Q,C], keys and values [N,S,C], allowed [N,Q,S] to [N,Q,C]."""
        x = self.norm(queries) if self.pre_norm else queries
        attended = self.multihead_attn(x + query_position, keys, values, allowed)
        queries = queries + self.dropout(attended)
        return queries if self.pre_norm else self.norm(queries)


class FFNLayer(nn.Module):
    """Two linear layers with ReLU between them, residual and LayerNorm (first when ``pre_norm``)."""

    def __init__(self, dim: int, feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, feedforward)
        self.linear2 = nn.Linear(feedforward, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, queries: Tensor) -> Tensor:
        """Map [N,Q,C] to [N,Q,C]."""
        x = self.norm(queries) if self.pre_norm else queries
        x = self.linear2(self.dropout(F.relu_(self.linear1(x))))
        queries = queries + self.dropout(x)
        return queries if self.pre_norm else self.norm(queries)


class MLP(nn.Module):
    """Linear layers with ReLU between them; ``layers.{i}`` in the state dict."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu_(layer(x))
        return self.layers[-1](x)


def unblock_empty_rows(allowed: Tensor) -> Tensor:
    """Let queries with an empty attention mask attend everywhere: bool [..., Q, S] to the same shape.

    The softmax over an empty row is NaN; the released code opens such rows completely, and so does this.
    """
    return allowed | ~allowed.any(dim=-1, keepdim=True)
