"""Temporal layer of THE-Mask: makes the first clip and frame queries, and merges frame queries into clip queries.

Axes: B clips, T frames, Q queries, C channels, S tokens of all maps of a frame.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.config.keys.mask_former import MaskDecoderOptions
from the_mask.modeling.mask.mask_decoders.layers import MultiheadAttention

# With identity initialisation, the share of a clip query that comes from its frames after one layer.
_SUMMARY_GAIN = 3.0


class FeedForward(nn.Module):
    """Linear, ReLU, dropout, linear; Xavier weights."""

    def __init__(self, dim: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, feedforward)
        self.linear2 = nn.Linear(feedforward, dim)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.relu_(self.linear1(x))))


class TemporalLayer(nn.Module):
    """One instance is used at the start of the decoder (:meth:`start`) and in every masked layer (:meth:`combine`).

    Everything is post-norm. Dropout acts on residuals, attention weights and inside the feed-forward networks. The
    released layer has one more linear map, C to 2, whose output is unused; it is left out. Source: spec section 3 (a).
    """

    def __init__(self, options: MaskDecoderOptions) -> None:
        """With ``temporal_init`` "identity" it starts by passing the learned queries to the frames unchanged and their
        mean to the clip, so that stage 2 starts where stage 1 ended."""
        super().__init__()
        dim, heads, dropout = options.hidden_dim, options.nheads, options.temporal_dropout
        self.clip_self_attn = MultiheadAttention(dim, heads, dropout)
        self.clip_self_norm = nn.LayerNorm(dim)
        self.frame_self_attn = MultiheadAttention(dim, heads, dropout)
        self.frame_self_norm = nn.LayerNorm(dim)
        self.frame_cross_attn = MultiheadAttention(dim, heads, dropout)
        self.frame_cross_norm = nn.LayerNorm(dim)
        self.frame_ffn = FeedForward(dim, options.dim_feedforward, dropout)
        self.frame_ffn_norm = nn.LayerNorm(dim)
        self.frame_score = nn.Linear(dim, 1)
        self.frame_value = nn.Linear(dim, dim)
        self.combine_norm = nn.LayerNorm(dim)
        self.clip_ffn = FeedForward(dim, options.dim_feedforward, dropout)
        self.clip_ffn_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.frame_score, self.frame_value):
            nn.init.xavier_uniform_(layer.weight)
        if options.temporal_init == "identity":
            self._start_as_identity()

    def _start_as_identity(self) -> None:
        """Set every residual branch to zero except the summary, which becomes the mean of the frame queries."""
        for attention in (self.clip_self_attn, self.frame_self_attn, self.frame_cross_attn):
            nn.init.zeros_(attention.out_proj.weight)
            nn.init.zeros_(attention.out_proj.bias)
        for network in (self.frame_ffn, self.clip_ffn):
            nn.init.zeros_(network.linear2.weight)
            nn.init.zeros_(network.linear2.bias)
        nn.init.zeros_(self.frame_score.weight)
        nn.init.zeros_(self.frame_score.bias)
        with torch.no_grad():
            self.frame_value.weight.copy_(_SUMMARY_GAIN * torch.eye(self.frame_value.in_features))
            self.frame_value.bias.zero_()

    def start(self, features: Tensor, query_position: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Make the first clip and frame queries.

        Args:
            features: learned query features [Q, C]. query_position: [Q, C].
            keys, values: tokens of all maps of every frame, [B, T, S, C].

        Returns:
            clip queries [B, Q, C] and frame queries [B, T, Q, C].
        """
        clips, frames = keys.shape[:2]
        x = features.expand(clips, -1, -1)
        located = x + query_position
        clip = self.clip_self_norm(x + self.dropout(self.clip_self_attn(located, located, x)))
        frame = self.frame_self_norm(x + self.dropout(self.frame_self_attn(located, located, x)))
        # The same for all frames up to here; from here each frame reads its own tokens, without a mask.
        frame = frame.repeat_interleave(frames, dim=0)
        attended = self.frame_cross_attn(frame + query_position, keys.flatten(0, 1), values.flatten(0, 1))
        frame = self.frame_cross_norm(frame + self.dropout(attended))
        frame = self.frame_ffn_norm(frame + self.dropout(self.frame_ffn(frame)))
        return clip, frame.unflatten(0, (clips, frames))

    def frame_weights(self, frame: Tensor) -> Tensor:
        """Weight of each frame query in its clip query: [B,T,Q,C] to [B,T,Q,1], summing to 1 over T."""
        return self.frame_score(frame).softmax(dim=1)

    def combine(self, clip: Tensor, frame: Tensor) -> Tensor:
        """Merge frame queries [B,T,Q,C] into clip queries [B,Q,C]."""
        summary = (self.frame_weights(frame) * self.frame_value(frame)).sum(dim=1)
        clip = self.combine_norm(clip + self.dropout(summary))
        return self.clip_ffn_norm(clip + self.dropout(self.clip_ffn(clip)))
