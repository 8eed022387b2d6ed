"""Head of Hugging Face's ``Mask2FormerForUniversalSegmentation`` (whole names, without the backbone's)."""

from __future__ import annotations

from the_mask.weights.converters.mask2former import NAMES, SETTINGS
from the_mask.weights.converters.parts import Part
from the_mask.weights.converters.rules import Rule, join, move

_LEAF = r"\.(?P<leaf>weight|bias)"


def head_rules() -> tuple[Rule, ...]:
    """Rules from the names of the whole model to those of our head."""
    pixel = r"model\.pixel_level_module\.decoder\."
    encoder, ours = rf"{pixel}encoder\.layers\.(\d+)\.", r"pixel_decoder.transformer.encoder.layers.\1."
    module = r"model\.transformer_module\."
    decoder = rf"{module}decoder\.layers\.(\d+)\."
    layers = {
        name: rf"predictor.transformer_{name}_layers.\1." for name in ("cross_attention", "self_attention", "ffn")
    }
    return (
        move(rf"{pixel}level_embed", "pixel_decoder.transformer.level_embed"),
        move(rf"{pixel}input_projections\.(\d+)\.([01]){_LEAF}", r"pixel_decoder.input_proj.\1.\2.\g<leaf>"),
        move(rf"{encoder}(self_attn\..*)", rf"{ours}\2"),
        move(rf"{encoder}self_attn_layer_norm{_LEAF}", rf"{ours}norm1.\g<leaf>"),
        move(rf"{encoder}fc([12]){_LEAF}", rf"{ours}linear\2.\g<leaf>"),
        move(rf"{encoder}final_layer_norm{_LEAF}", rf"{ours}norm2.\g<leaf>"),
        move(rf"{pixel}mask_projection{_LEAF}", r"pixel_decoder.mask_features.\g<leaf>"),
        move(rf"{pixel}(adapter_\d+|layer_\d+)\.0{_LEAF}", r"pixel_decoder.\1.\g<leaf>"),
        move(rf"{pixel}(adapter_\d+|layer_\d+)\.1{_LEAF}", r"pixel_decoder.\1.norm.\g<leaf>"),
        move(rf"{module}queries_embedder\.weight", "predictor.query_embed.weight"),
        move(rf"{module}queries_features\.weight", "predictor.query_feat.weight"),
        move(rf"{module}level_embed\.weight", "predictor.level_embed.weight"),
        move(rf"{module}input_projections\.(\d+){_LEAF}", r"predictor.input_proj.\1.\g<leaf>"),
        join(
            rf"{decoder}self_attn\.(?P<part>[qkv])_proj{_LEAF}",
            rf"{layers['self_attention']}self_attn.in_proj_\g<leaf>",
            ("q", "k", "v"),
        ),
        move(rf"{decoder}self_attn\.out_proj{_LEAF}", rf"{layers['self_attention']}self_attn.out_proj.\g<leaf>"),
        move(rf"{decoder}self_attn_layer_norm{_LEAF}", rf"{layers['self_attention']}norm.\g<leaf>"),
        move(rf"{decoder}cross_attn\.(in_proj_\w+|out_proj\.\w+)", rf"{layers['cross_attention']}multihead_attn.\2"),
        move(rf"{decoder}cross_attn_layer_norm{_LEAF}", rf"{layers['cross_attention']}norm.\g<leaf>"),
        move(rf"{decoder}fc([12]){_LEAF}", rf"{layers['ffn']}linear\2.\g<leaf>"),
        move(rf"{decoder}final_layer_norm{_LEAF}", rf"{layers['ffn']}norm.\g<leaf>"),
        move(rf"{module}decoder\.layernorm{_LEAF}", r"predictor.decoder_norm.\g<leaf>"),
        move(
            rf"{module}decoder\.mask_predictor\.mask_embedder\.(\d)\.0{_LEAF}",
            r"predictor.mask_embed.layers.\1.\g<leaf>",
        ),
        move(rf"class_predictor{_LEAF}", r"predictor.class_embed.\g<leaf>"),
    )


PARTS = (
    Part(
        "Mask2Former head, Hugging Face layout",
        "hf-mask2former",
        (r"model\.transformer_module\.queries_features\.weight",),
        head_rules(),
        NAMES,
        settings=SETTINGS,
    ),
)
