"""Masked-attention decoder: one set of queries per clip (Mask2Former; THE-Mask's one-frame stage).

Axes: see :mod:`the_mask.modeling.mask.mask_decoders.base`.
"""

from __future__ import annotations

from torch import Tensor

from the_mask.modeling.mask.mask_decoders.base import (
    MaskDecoder,
    Predictions,
    attention_mask,
    mask_logits_of_layers,
    nest_predictions,
)
from the_mask.modeling.mask.mask_decoders.registry import MASK_DECODERS


@MASK_DECODERS.register()
class MaskedAttentionDecoder(MaskDecoder):
    """Queries attend to one map per layer, inside their own mask; the frames of a clip are concatenated along the keys.

    Source: Mask2Former, section 3.2 and released code; several frames as in Mask2Former for video.
    """

    def decode(
        self, keys: list[Tensor], values: list[Tensor], small: list[Tensor], features: Tensor, shown: slice, aux: bool
    ) -> Predictions:
        logits, kept = [], []
        queries = self.query_feat.weight.expand(features.shape[0], -1, -1)
        layers = len(self.transformer_ffn_layers)
        for layer in range(layers + 1):
            decoded = self.decoder_norm(queries)
            embeddings = self.mask_embed(decoded)
            if aux or layer == layers:
                logits.append(self.class_embed(decoded))
                kept.append(embeddings)
            if layer < layers:
                level = layer % len(keys)
                allowed = attention_mask(embeddings, small[level]).transpose(1, 2).flatten(2)
                queries = self.refine(layer, queries, keys[level].flatten(1, 2), values[level].flatten(1, 2), allowed)
        return nest_predictions(logits, mask_logits_of_layers(kept, features))
