"""Swin: from the original layout, timm's, OpenMMLab's and Hugging Face's to timm's names below ``model.``."""

from __future__ import annotations

from torch import Tensor

from the_mask.weights.converters.parts import Part
from the_mask.weights.converters.rules import Names, Rule, drop, join, move

NAMES = (
    Names(
        """
        model.patch_embed.{proj,norm}.*
        model.layers.{0..3}.blocks.#.{norm1,norm2,attn.qkv,attn.proj,mlp.fc1,mlp.fc2}.*
        model.layers.{0..3}.blocks.#.attn.relative_position_bias_table
        model.layers.{1..3}.downsample.norm.*
        model.layers.{1..3}.downsample.reduction.weight
        """
    ),
    Names("norm{0..3}.*", optional=True),
)

CLASSIFIER = drop(r"(norm|head|head\.fc|avgpool)\.(weight|bias)", "classifier")
TABLES = drop(r".*\.(attn_mask|relative_position_index|relative_coords_table)", "computed from the sizes")
OUTPUT_NORMS = move(r"norm([0-3])\.(weight|bias)", r"norm\1.\2")


def later_stage(template: str):
    """Stage number + 1: timm merges patches at the start of a stage, others at the end of the previous one."""
    return lambda match: match.expand(template).replace("<next>", str(int(match["stage"]) + 1))


def unfold_order(weight: Tensor) -> Tensor:
    """Reorder the last axis of OpenMMLab's patch merging to the original order.

    In OpenMMLab, the four pixels of a cell are the fastest index, row by row; in the original, they are the slowest,
    column by column.
    """
    pixels = weight.unflatten(-1, (-1, 4)).movedim(-1, -2)
    return pixels[..., [0, 2, 1, 3], :].flatten(-2)


def huggingface_rules() -> tuple[Rule, ...]:
    """Rules for the names on disk, and for those that newer releases use in memory."""
    block = r"(?:swin\.)?encoder\.layers\.(\d)\.blocks\.(\d+)\."
    ours = r"model.layers.\1.blocks.\2."
    leaf = r"\.(?P<leaf>weight|bias)"
    return (
        move(rf"(?:swin\.)?embeddings\.patch_embeddings\.projection{leaf}", r"model.patch_embed.proj.\g<leaf>"),
        move(rf"(?:swin\.)?embeddings\.norm{leaf}", r"model.patch_embed.norm.\g<leaf>"),
        move(rf"{block}layernorm_before{leaf}", rf"{ours}norm1.\g<leaf>"),
        move(rf"{block}layernorm_after{leaf}", rf"{ours}norm2.\g<leaf>"),
        join(
            rf"{block}attention\.self\.(?P<part>query|key|value){leaf}",
            rf"{ours}attn.qkv.\g<leaf>",
            ("query", "key", "value"),
        ),
        join(rf"{block}attention\.(?P<part>[qkv])_proj{leaf}", rf"{ours}attn.qkv.\g<leaf>", ("q", "k", "v")),
        move(rf"{block}attention\.(?:output\.dense|o_proj){leaf}", rf"{ours}attn.proj.\g<leaf>"),
        move(
            rf"{block}attention\.(?:self|relative_position_bias)\.relative_position_bias_table",
            rf"{ours}attn.relative_position_bias_table",
        ),
        move(rf"{block}(?:intermediate\.dense|mlp\.fc1){leaf}", rf"{ours}mlp.fc1.\g<leaf>"),
        move(rf"{block}(?:output\.dense|mlp\.fc2){leaf}", rf"{ours}mlp.fc2.\g<leaf>"),
        move(
            r"(?:swin\.)?encoder\.layers\.(?P<stage>\d)\.downsample\.(norm\.weight|norm\.bias|reduction\.weight)",
            later_stage(r"model.layers.<next>.downsample.\2"),
        ),
        move(
            rf"hidden_states_norms\.stage(?P<stage>[1-4]){leaf}",
            lambda match: f"norm{int(match['stage']) - 1}.{match['leaf']}",
        ),
        drop(r"(?:swin\.)?layernorm\.(weight|bias)", "norm before the classifier, not used by a segmentor"),
        TABLES,
    )


PARTS = (
    Part(
        "Swin, Hugging Face layout",
        "hf-mask2former",
        (r"(swin\.)?embeddings\.patch_embeddings\.projection\.weight", r"(swin\.)?encoder\.layers\.0\.blocks\.0\..*"),
        huggingface_rules(),
        NAMES,
    ),
    Part(
        "Swin, OpenMMLab layout",
        "mmseg",
        (r"stages\.\d\.blocks\.\d+\.attn\.w_msa\.qkv\.weight",),
        (
            TABLES,
            move(r"patch_embed\.projection\.(weight|bias)", r"model.patch_embed.proj.\1"),
            move(r"patch_embed\.norm\.(weight|bias)", r"model.patch_embed.norm.\1"),
            move(r"stages\.(\d\.blocks\.\d+\.norm[12]\..*)", r"model.layers.\1"),
            move(r"stages\.(\d\.blocks\.\d+\.attn)\.w_msa\.(.*)", r"model.layers.\1.\2"),
            move(r"stages\.(\d\.blocks\.\d+)\.ffn\.layers\.0\.0\.(.*)", r"model.layers.\1.mlp.fc1.\2"),
            move(r"stages\.(\d\.blocks\.\d+)\.ffn\.layers\.1\.(.*)", r"model.layers.\1.mlp.fc2.\2"),
            move(
                r"stages\.(?P<stage>\d)\.downsample\.(norm\.weight|norm\.bias|reduction\.weight)",
                later_stage(r"model.layers.<next>.downsample.\2"),
                unfold_order,
            ),
            OUTPUT_NORMS,
        ),
        NAMES,
    ),
    Part(
        "Swin, original layout",
        "swin",
        (r"layers\.0\.downsample\.reduction\.weight", r"layers\.0\.blocks\.0\.attn\.qkv\.weight"),
        (
            TABLES,
            CLASSIFIER,
            move(
                r"layers\.(?P<stage>\d)\.downsample\.(norm\.weight|norm\.bias|reduction\.weight)",
                later_stage(r"model.layers.<next>.downsample.\2"),
            ),
            move(r"(patch_embed|layers)\.(.*)", r"model.\1.\2"),
            OUTPUT_NORMS,
        ),
        NAMES,
    ),
    Part(
        "Swin, timm layout",
        "swin",
        (r"layers\.1\.downsample\.reduction\.weight", r"layers\.0\.blocks\.0\.attn\.qkv\.weight"),
        (TABLES, CLASSIFIER, move(r"(patch_embed|layers)\.(.*)", r"model.\1.\2"), OUTPUT_NORMS),
        NAMES,
        unlike=(r"layers\.0\.downsample\..*",),
    ),
    Part("Swin", "native", (r"model\.layers\.0\.blocks\.0\.attn\.relative_position_bias_table",), (), NAMES),
)
