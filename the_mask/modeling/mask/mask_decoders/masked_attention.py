"""Masked-attention decoder: one set of queries per clip (Mask2Former; THE-Mask's one-frame stage).

Axes: see :mod:`the_mask.modeling.mask.mask_decoders.base`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from the_mask.modeling.mask.mask_decoders.base import (
    MaskDecoder,
    Predictions,
    attention_mask,
    check_frames,
    mask_logits,
    nest_predictions,
    shrink_mask_features,
)
from the_mask.modeling.mask.mask_decoders.registry import MASK_DECODERS


@MASK_DECODERS.register()
class MaskedAttentionDecoder(MaskDecoder):
    """Queries attend to one map per layer, inside their own mask; the frames of a clip are concatenated along the keys.

    Source: Mask2Former, section 3.2 and released code; several frames as in Mask2Former for video.
    """

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
        check_frames(mask_features, num_frames)
        keys, values = self.tokenize(maps, num_frames)
        small_features = shrink_mask_features(mask_features, maps, num_frames)
        features = mask_features.unflatten(0, (-1, num_frames))
        if last_frame_only:
            features = features[:, -1:]

        logits, masks = [], []
        queries = self.query_feat.weight.expand(features.shape[0], -1, -1)
        layers = len(self.transformer_ffn_layers)
        for layer in range(layers + 1):
            decoded = self.decoder_norm(queries)
            embeddings = self.mask_embed(decoded)
            if aux or layer == layers:
                logits.append(self.class_embed(decoded))
                masks.append(mask_logits(embeddings, features))
            if layer < layers:
                level = layer % len(maps)
                allowed = attention_mask(embeddings, small_features[level]).transpose(1, 2).flatten(2)
                queries = self.refine(layer, queries, keys[level].flatten(1, 2), values[level].flatten(1, 2), allowed)
        return nest_predictions(logits, masks)
