"""Mask decoders: maps and mask features to class logits and masks of a set of queries."""

from the_mask.modeling.mask.mask_decoders.masked_attention import MaskedAttentionDecoder
from the_mask.modeling.mask.mask_decoders.registry import MASK_DECODERS, build_mask_decoder
from the_mask.modeling.mask.mask_decoders.stage_init import RELEASED_NAMES, rename_released, stage1_to_stage2
from the_mask.modeling.mask.mask_decoders.temporal_aggregation import TemporalAggregationDecoder

__all__ = [
    "MASK_DECODERS",
    "RELEASED_NAMES",
    "MaskedAttentionDecoder",
    "TemporalAggregationDecoder",
    "build_mask_decoder",
    "rename_released",
    "stage1_to_stage2",
]
