"""Temporal aggregation decoder of THE-Mask: one query set per clip and one per frame, any number of frames.

Axes: see :mod:`the_mask.modeling.mask.mask_decoders.base`.

State-dict names, ours and those of the released checkpoints (under ``predictor``; ``TL`` is
``deformabel_transformer_cross_attention_layers`` there and ``temporal_layer`` here). Everything else has the same name.

    ==============================  ===============================
    released                        here
    ==============================  ===============================
    decoder_norm1                   decoder_norm
    decoder_norm2                   frame_norm
    class_embed, mask_embed         class_embed, mask_embed
    class_embed_aux                 frame_class_embed
    mask_embed_aux                  frame_mask_embed
    TL.self_attn, TL.norm2          TL.clip_self_attn, TL.clip_self_norm
    TL.self_attn_box, TL.norm2_box  TL.frame_self_attn, TL.frame_self_norm
    TL.cross_attn, TL.norm1_box     TL.frame_cross_attn, TL.frame_cross_norm
    TL.linear{1,2}_box              TL.frame_ffn.linear{1,2}
    TL.norm3_box                    TL.frame_ffn_norm
    TL.time_attention_weights       TL.frame_score
    TL.time_attention               TL.frame_value
    TL.norm1                        TL.combine_norm
    TL.linear{1,2}, TL.norm3        TL.clip_ffn.linear{1,2}, TL.clip_ffn_norm
    TL.reference_points             (dropped: never read)
    ==============================  ===============================

:data:`the_mask.modeling.mask.mask_decoders.stage_init.RELEASED_NAMES` is this table for programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from the_mask.config.keys.mask_former import MaskDecoderOptions
from the_mask.modeling.mask.mask_decoders.base import (
    MaskDecoder,
    Predictions,
    attention_mask,
    mask_logits_of_layers,
    nest_predictions,
)
from the_mask.modeling.mask.mask_decoders.layers import MLP
from the_mask.modeling.mask.mask_decoders.registry import MASK_DECODERS
from the_mask.modeling.mask.mask_decoders.temporal_layer import TemporalLayer


@MASK_DECODERS.register()
class TemporalAggregationDecoder(MaskDecoder):
    """Frame queries attend to their own frame only; after each layer they are merged into the clip queries.

    The clip's masks restrict the attention of the frame queries, which never see the clip queries' content. A clip of
    one frame runs the same code, with weight 1 for its frame. Frame order has no effect, not even with the 3-D
    encoding: all keys of a frame share its offset, which softmax ignores. Source: THE-Mask, spec section 3.
    """

    @configurable
    def __init__(
        self, in_channels: Sequence[int], *, options: MaskDecoderOptions = MaskDecoderOptions(), **shared: Any
    ) -> None:
        """``shared`` are the other arguments of :class:`MaskDecoder`."""
        super().__init__(in_channels, options=options, **shared)
        dim = options.hidden_dim
        self.temporal_layer = TemporalLayer(options)
        self.frame_norm = nn.LayerNorm(dim)
        self.frame_class_embed = nn.Linear(dim, self.num_classes + 1)
        self.frame_mask_embed = MLP(dim, dim, dim, self.mask_dim)

    def decode(
        self, keys: list[Tensor], values: list[Tensor], small: list[Tensor], features: Tensor, shown: slice, aux: bool
    ) -> Predictions:
        clip, frame = self.temporal_layer.start(
            self.query_feat.weight, self.query_embed.weight, torch.cat(keys, dim=2), torch.cat(values, dim=2)
        )
        clip_logits, clip_kept, frame_logits, frame_kept = [], [], [], []
        layers = len(self.transformer_ffn_layers)
        for layer in range(layers + 1):
            decoded = self.decoder_norm(clip)
            embeddings = self.mask_embed(decoded)
            if aux or layer == layers:
                clip_logits.append(self.class_embed(decoded))
                clip_kept.append(embeddings)
                decoded = self.frame_norm(frame[:, shown])
                frame_logits.append(self.frame_class_embed(decoded))
                frame_kept.append(self.frame_mask_embed(decoded))
            if layer < layers:
                level = layer % len(keys)
                allowed = attention_mask(embeddings, small[level]).flatten(0, 1)
                # Each frame is its own sequence.
                frame = self.refine(
                    layer, frame.flatten(0, 1), keys[level].flatten(0, 1), values[level].flatten(0, 1), allowed
                ).unflatten(0, (-1, frame.shape[1]))
                clip = self.temporal_layer.combine(clip, frame)
        masks = mask_logits_of_layers([*clip_kept, *frame_kept], features)
        return {
            **nest_predictions(clip_logits, masks[: len(clip_kept)]),
            "frame": nest_predictions(frame_logits, masks[len(clip_kept) :]),
        }
