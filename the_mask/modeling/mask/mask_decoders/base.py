"""Shared by all mask decoders: queries, token layout, prediction heads and the attention mask of the next layer.

Axes: B clips, T frames, Q queries, K classes, C channels, h w size of the mask features, h_l w_l size of map l,
S tokens. Maps and mask features come stacked clip by clip: frame t of clip b is at index b*T + t.

A decoder returns a dict: ``pred_logits`` [B,Q,K+1], ``pred_masks`` [B,Q,T,h,w] (logits) and ``aux_outputs``, a list of
such dicts for the initial queries and every layer but the last (empty unless ``aux``). A decoder with a frame branch
adds ``frame``: the same dict with ``pred_logits`` [B,T,Q,K+1].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.config.keys.mask_former import MaskDecoderOptions
from the_mask.modeling.mask.mask_decoders.layers import (
    MLP,
    CrossAttentionLayer,
    FFNLayer,
    SelfAttentionLayer,
    unblock_empty_rows,
)
from the_mask.modeling.mask.position_encoding import position_encoding
from the_mask.ops.fast_linear import fast_linear, fast_product
from the_mask.ops.inference import is_plain

Predictions = dict[str, Any]


def mask_logits(embeddings: Tensor, mask_features: Tensor) -> Tensor:
    """Dot products of mask embeddings and per-pixel features.

    Args:
        embeddings: [B, Q, C], one set per clip, or [B, T, Q, C], one per frame.
        mask_features: [B, T, C, h, w].

    Returns:
        [B, Q, T, h, w] logits (a view).
    """
    if embeddings.dim() == 3:
        embeddings = embeddings[:, None]
    # One product per frame: an einsum over the clip would first copy the features to [B, C, T*h*w].
    product = fast_product(embeddings, mask_features.flatten(3))
    return product.unflatten(3, mask_features.shape[3:]).transpose(1, 2)


def mask_logits_of_layers(embeddings: Sequence[Tensor], mask_features: Tensor) -> list[Tensor]:
    """:func:`mask_logits` of the embeddings of several layers, whose gradients are computed together."""
    features = mask_features.flatten(3)
    if not (torch.is_grad_enabled() and is_plain(features, *embeddings)):
        return [mask_logits(one, mask_features) for one in embeddings]
    frames = features.shape[1]
    per_frame = [one if one.dim() == 4 else one[:, None].expand(-1, frames, -1, -1) for one in embeddings]
    products: tuple[Tensor, ...] = _MaskProducts.apply(features, *per_frame)
    return [product.unflatten(3, mask_features.shape[3:]).transpose(1, 2) for product in products]


class _MaskProducts(torch.autograd.Function):
    """Products [B, T, Q, P] of features [B, T, C, P] and the embeddings [B, T, Q, C] of each layer.

    The losses use the few masks that are matched: most rows of a gradient are zero and left out of its products.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, *embeddings: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(features, *embeddings)
        ctx.set_materialize_grads(False)
        return tuple(fast_product(one, features) for one in embeddings)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        features, *embeddings = ctx.saved_tensors
        for_features = torch.zeros_like(features)
        for_embeddings = [torch.zeros_like(one) for one in embeddings]
        given = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        for b, t in itertools.product(*map(range, features.shape[:2])) if given else ():
            # Of each layer, the rows that are not zero (or not a number).
            used = [(grad[b, t].abs().sum(1) != 0).nonzero()[:, 0] for _, grad in given]
            grad = torch.cat([grad[b, t, rows] for (_, grad), rows in zip(given, used, strict=True)])
            matched = torch.cat([embeddings[i][b, t, rows] for (i, _), rows in zip(given, used, strict=True)])
            for_features[b, t] = fast_product(matched.t(), grad)
            parts = fast_linear(grad, features[b, t]).split([len(rows) for rows in used])
            for (i, _), rows, part in zip(given, used, parts, strict=True):
                for_embeddings[i][b, t, rows] = part
        return for_features, *for_embeddings


def shrink_mask_features(mask_features: Tensor, maps: Sequence[Tensor], num_frames: int) -> list[Tensor]:
    """Resize mask features [B*T,C,h,w] to the size of each map: list of [B,T,C,h_l,w_l], without gradient.

    A mask is linear in the features, so resizing them once and multiplying at each map's size gives the same
    attention masks as resizing the Q masks of every layer, for a fraction of the work.
    """
    detached = mask_features.detach()
    return [
        F.interpolate(detached, size=x.shape[-2:], mode="bilinear", align_corners=False).unflatten(0, (-1, num_frames))
        for x in maps
    ]


def attention_mask(embeddings: Tensor, features: Tensor) -> Tensor:
    """Attention mask of each query: True where its mask probability is at least 0.5.

    Args:
        embeddings: [B, Q, C]. features: [B, T, C, h_l, w_l] of :func:`shrink_mask_features`.

    Returns:
        bool [B, T, Q, h_l*w_l]; rows without any True still need :func:`unblock_empty_rows`. No gradient.
    """
    return mask_logits(embeddings.detach(), features).transpose(1, 2).flatten(3) >= 0


class MaskDecoder(nn.Module):
    """Parameters and steps shared by the decoders. Subclasses define :meth:`decode`.

    State-dict keys are those of the official Detectron2 Mask2Former.
    """

    @configurable
    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        num_classes: int,
        mask_dim: int,
        options: MaskDecoderOptions = MaskDecoderOptions(),
    ) -> None:
        super().__init__()
        hidden_dim, layers = options.hidden_dim, options.dec_layers - 1
        if hidden_dim % 4:
            raise ValueError(f"MODEL.MASK_FORMER.HIDDEN_DIM is {hidden_dim}; position encoding needs a multiple of 4")
        self.num_classes, self.mask_dim = num_classes, mask_dim
        self.position: Callable[..., Tensor] = position_encoding(options.position_encoding)
        self.input_proj = nn.ModuleList(
            _projection(channels, hidden_dim) if channels != hidden_dim or options.enforce_input_proj else nn.Identity()
            for channels in in_channels
        )
        self.level_embed = nn.Embedding(len(in_channels), hidden_dim)
        self.query_feat = nn.Embedding(options.num_object_queries, hidden_dim)
        self.query_embed = nn.Embedding(options.num_object_queries, hidden_dim)
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(hidden_dim, options.nheads, options.dropout, options.pre_norm) for _ in range(layers)
        )
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(hidden_dim, options.nheads, options.dropout, options.pre_norm) for _ in range(layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FFNLayer(hidden_dim, options.dim_feedforward, options.dropout, options.pre_norm) for _ in range(layers)
        )
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(hidden_dim, hidden_dim, hidden_dim, mask_dim)

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: Sequence[int]) -> dict[str, Any]:
        return {
            "in_channels": in_channels,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
            "options": MaskDecoderOptions.from_config(cfg),
        }

    def forward(
        self,
        maps: Sequence[Tensor],
        mask_features: Tensor,
        num_frames: int = 1,
        aux: bool = False,
        last_frame_only: bool = False,
    ) -> Predictions:
        """Decode clips.

        Args:
            maps: L tensors [B*T, C_l, h_l, w_l], coarsest first.
            mask_features: [B*T, C, h, w].
            num_frames: T.
            aux: also predict from the initial queries and from every layer.
            last_frame_only: masks of the newest frame of each clip only (its T axis is 1).

        Returns:
            predictions as described in :mod:`the_mask.modeling.mask.mask_decoders.base`.
        """
        if num_frames < 1 or mask_features.shape[0] % num_frames:
            raise ValueError(f"{mask_features.shape[0]} stacked frames do not form clips of {num_frames} frames")
        keys, values = self.tokenize(maps, num_frames)
        small = shrink_mask_features(mask_features, maps, num_frames)
        shown = slice(num_frames - 1, None) if last_frame_only else slice(None)
        return self.decode(keys, values, small, mask_features.unflatten(0, (-1, num_frames))[:, shown], shown, aux)

    def decode(
        self, keys: list[Tensor], values: list[Tensor], small: list[Tensor], features: Tensor, shown: slice, aux: bool
    ) -> Predictions:
        """What a subclass makes of the tokens.

        Args:
            keys, values: of :meth:`tokenize`.
            small: of :func:`shrink_mask_features`.
            features: mask features [B, T, C, h, w] of the frames that are shown.
            shown: these frames.
            aux: see :meth:`forward`.
        """
        raise NotImplementedError

    def tokenize(self, maps: Sequence[Tensor], num_frames: int) -> tuple[list[Tensor], list[Tensor]]:
        """Turn maps [B*T,C_l,h_l,w_l] into keys and values of attention, two lists of [B,T,S_l,C].

        Both include the level embedding; only the keys include the position.
        """
        keys, values = [], []
        for level, x in enumerate(maps):
            height, width = x.shape[-2:]
            projected = self.input_proj[level](x).flatten(2).transpose(1, 2) + self.level_embed.weight[level]
            values.append(projected.unflatten(0, (-1, num_frames)))
            encoding = self.position(num_frames, height, width, projected.shape[-1], x.device)
            keys.append(values[-1] + encoding.flatten(2).transpose(1, 2))
        return keys, values

    def refine(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
        """Run masked layer ``layer``: cross-attention, self-attention, feed-forward.

        Args:
            queries: [N,Q,C]. keys, values: [N,S,C]. allowed: bool [N,Q,S]; empty rows attend to everything.

        Returns:
            [N,Q,C].
        """
        query_position = self.query_embed.weight
        allowed = unblock_empty_rows(allowed)
        queries = self.transformer_cross_attention_layers[layer](queries, query_position, keys, values, allowed)
        queries = self.transformer_self_attention_layers[layer](queries, query_position)
        return self.transformer_ffn_layers[layer](queries)


def nest_predictions(logits: Sequence[Tensor], masks: Sequence[Tensor]) -> Predictions:
    """Collect the predictions of all supervised layers, the final one last, into the dict of the module docstring."""
    pairs = [{"pred_logits": a, "pred_masks": b} for a, b in zip(logits, masks, strict=True)]
    return {**pairs[-1], "aux_outputs": pairs[:-1]}


def _projection(in_channels: int, out_channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, 1)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
