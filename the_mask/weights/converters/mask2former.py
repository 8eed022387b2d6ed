"""Mask-classification heads: ours (Detectron2 Mask2Former's names), its older releases, THE-Mask, and OpenMMLab's.

Names here are without the prefix ``sem_seg_head.`` (Detectron2), ``decode_head.`` or ``panoptic_head.`` (OpenMMLab).
"""

from __future__ import annotations

import re

from the_mask.modeling.mask.mask_decoders.stage_init import RELEASED_NAMES
from the_mask.weights.converters.parts import BOOKKEEPING, Part
from the_mask.weights.converters.rules import Names, Rule, drop, move

_ATTENTION = "{in_proj_weight,in_proj_bias,out_proj.weight,out_proj.bias}"
NAMES = (
    Names(
        f"""
        pixel_decoder.input_proj.#.{{0,1}}.*
        pixel_decoder.transformer.level_embed
        pixel_decoder.transformer.encoder.layers.#.self_attn.{{sampling_offsets,attention_weights}}.*
        pixel_decoder.transformer.encoder.layers.#.self_attn.{{value_proj,output_proj}}.*
        pixel_decoder.transformer.encoder.layers.#.{{norm1,linear1,linear2,norm2}}.*
        pixel_decoder.mask_features.*
        predictor.transformer_self_attention_layers.#d.self_attn.{_ATTENTION}
        predictor.transformer_cross_attention_layers.#d.multihead_attn.{_ATTENTION}
        predictor.transformer_{{self,cross}}_attention_layers.#d.norm.*
        predictor.transformer_ffn_layers.#d.{{linear1,linear2,norm}}.*
        predictor.decoder_norm.* predictor.class_embed.* predictor.mask_embed.layers.{{0..2}}.*
        predictor.{{query_feat,query_embed,level_embed}}.weight
        """
    ),
    Names("pixel_decoder.{adapter,layer}_1.weight pixel_decoder.{adapter,layer}_1.norm.*", optional=True),
    # Without GroupNorm the convolutions of the FPN have biases.
    Names("pixel_decoder.{adapter,layer}_1.bias", optional=True),
    Names("predictor.input_proj.#.*", optional=True),
    # THE-Mask for video.
    Names(
        f"""
        predictor.frame_norm.* predictor.frame_class_embed.* predictor.frame_mask_embed.layers.{{0..2}}.*
        predictor.temporal_layer.{{clip_self,frame_self,frame_cross}}_attn.{_ATTENTION}
        predictor.temporal_layer.{{clip_self,frame_self,frame_cross,combine,clip_ffn,frame_ffn}}_norm.*
        predictor.temporal_layer.{{clip,frame}}_ffn.linear{{1,2}}.*
        predictor.temporal_layer.{{frame_score,frame_value}}.*
        """,
        optional=True,
    ),
)

# The released code enlarges the masks of the queries to the network input before merging them into classes.
SETTINGS = (("MODEL.MASK_FORMER.MERGE_AT", "input"),)

# Unused layers of OpenMMLab's base class of heads.
_UNUSED = drop(r"conv_seg\.(weight|bias)", "an unused layer")
_PIXEL_PARTS = r"(?:input_proj|transformer|mask_features|adapter_\d+|layer_\d+)\b.*"

DETECTRON2_RULES: tuple[Rule, ...] = (
    # The first image release has another name for the learned queries.
    move(r"predictor\.static_query\.weight", "predictor.query_feat.weight"),
    # Releases before version 2 have no "pixel_decoder."; a converter that relies on the lost version number doubles it.
    move(rf"({_PIXEL_PARTS})", r"pixel_decoder.\1"),
    move(rf"(?:pixel_decoder\.){{2,}}({_PIXEL_PARTS})", r"pixel_decoder.\1"),
    _UNUSED,
)


def released_video_rules() -> tuple[Rule, ...]:
    """Rules for the names of THE-Mask's video decoder that differ from ours."""
    rules = []
    for released, ours in RELEASED_NAMES.items():
        pattern = rf"predictor\.{re.escape(released)}\.(.*)"
        rules.append(move(pattern, rf"predictor.{ours}.\1") if ours else drop(pattern, "nothing reads it"))
    return tuple(rules)


def openmmlab_rules() -> tuple[Rule, ...]:
    """Rules for mmdet's Mask2Former, releases 2 (``attentions.0``, ``ffns.0``) and 3 (``self_attn``, ``ffn``)."""
    leaf = r"(?P<leaf>weight|bias)"
    encoder, decoder = r"pixel_decoder\.encoder\.layers\.(\d+)\.", r"transformer_decoder\.layers\.(\d+)\."
    ours = r"pixel_decoder.transformer.encoder.layers.\1."
    ffn = r"ffns?(?:\.0)?\.layers\."
    cross, own = r"(?:attentions\.0|cross_attn)", r"(?:attentions\.1|self_attn)"
    multihead = r"\.attn\.(in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)"
    layers = {
        name: rf"predictor.transformer_{name}_layers.\1." for name in ("cross_attention", "self_attention", "ffn")
    }
    return (
        move(rf"pixel_decoder\.input_convs\.(\d+)\.conv\.{leaf}", r"pixel_decoder.input_proj.\1.0.\g<leaf>"),
        move(rf"pixel_decoder\.input_convs\.(\d+)\.gn\.{leaf}", r"pixel_decoder.input_proj.\1.1.\g<leaf>"),
        move(rf"pixel_decoder\.lateral_convs\.0\.conv\.{leaf}", r"pixel_decoder.adapter_1.\g<leaf>"),
        move(rf"pixel_decoder\.lateral_convs\.0\.gn\.{leaf}", r"pixel_decoder.adapter_1.norm.\g<leaf>"),
        move(rf"pixel_decoder\.output_convs\.0\.conv\.{leaf}", r"pixel_decoder.layer_1.\g<leaf>"),
        move(rf"pixel_decoder\.output_convs\.0\.gn\.{leaf}", r"pixel_decoder.layer_1.norm.\g<leaf>"),
        move(r"pixel_decoder\.level_encoding\.weight", "pixel_decoder.transformer.level_embed"),
        move(
            rf"{encoder}(?:attentions\.0|self_attn)\.(sampling_offsets|attention_weights|value_proj|output_proj)\.{leaf}",
            rf"{ours}self_attn.\2.\g<leaf>",
        ),
        move(rf"{encoder}{ffn}0\.0\.{leaf}", rf"{ours}linear1.\g<leaf>"),
        move(rf"{encoder}{ffn}1\.{leaf}", rf"{ours}linear2.\g<leaf>"),
        move(rf"{encoder}norms\.0\.{leaf}", rf"{ours}norm1.\g<leaf>"),
        move(rf"{encoder}norms\.1\.{leaf}", rf"{ours}norm2.\g<leaf>"),
        move(rf"pixel_decoder\.mask_feature\.{leaf}", r"pixel_decoder.mask_features.\g<leaf>"),
        move(rf"{decoder}{cross}{multihead}", rf"{layers['cross_attention']}multihead_attn.\2"),
        move(rf"{decoder}{own}{multihead}", rf"{layers['self_attention']}self_attn.\2"),
        move(rf"{decoder}norms\.0\.{leaf}", rf"{layers['cross_attention']}norm.\g<leaf>"),
        move(rf"{decoder}norms\.1\.{leaf}", rf"{layers['self_attention']}norm.\g<leaf>"),
        move(rf"{decoder}norms\.2\.{leaf}", rf"{layers['ffn']}norm.\g<leaf>"),
        move(rf"{decoder}{ffn}0\.0\.{leaf}", rf"{layers['ffn']}linear1.\g<leaf>"),
        move(rf"{decoder}{ffn}1\.{leaf}", rf"{layers['ffn']}linear2.\g<leaf>"),
        move(rf"transformer_decoder\.post_norm\.{leaf}", r"predictor.decoder_norm.\g<leaf>"),
        move(r"(query_feat|query_embed|level_embed)\.weight", r"predictor.\1.weight"),
        move(rf"decoder_input_projs\.(\d+)\.{leaf}", r"predictor.input_proj.\1.\g<leaf>"),
        move(rf"cls_embed\.{leaf}", r"predictor.class_embed.\g<leaf>"),
        move(
            rf"mask_embed\.(?P<index>[024])\.{leaf}",
            lambda match: f"predictor.mask_embed.layers.{int(match['index']) // 2}.{match['leaf']}",
        ),
        drop(r"loss_cls\.class_weight", "weights of the loss"),
        drop(BOOKKEEPING, "bookkeeping"),
        _UNUSED,
    )


PARTS = (
    Part(
        "Mask2Former head, OpenMMLab layout",
        "mmseg",
        (r"pixel_decoder\.input_convs\.0\.conv\.weight", r"transformer_decoder\.layers\.0\..*"),
        openmmlab_rules(),
        NAMES,
        settings=SETTINGS,
    ),
    Part(
        "THE-Mask head for video, released layout",
        "the-mask",
        (r"predictor\.decoder_norm1\.weight",),
        (*released_video_rules(), *DETECTRON2_RULES),
        NAMES,
    ),
    Part(
        "Mask2Former head",
        "mask2former",
        (r"predictor\.transformer_cross_attention_layers\.0\..*",),
        DETECTRON2_RULES,
        NAMES,
        settings=SETTINGS,
    ),
)
