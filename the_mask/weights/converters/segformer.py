"""MiT, the encoder of SegFormer: released names (ours), OpenMMLab's and Hugging Face's."""

from __future__ import annotations

import re

from torch import Tensor

from the_mask.weights.converters.parts import Part
from the_mask.weights.converters.rules import Names, Rule, Template, drop, join, move, split

NAMES = (
    Names(
        """
        patch_embed{1..4}.{proj,norm}.* norm{1..4}.*
        block{1..4}.#.{norm1,norm2,attn.q,attn.kv,attn.proj,mlp.fc1,mlp.dwconv.dwconv,mlp.fc2}.*
        block{1..3}.#.attn.{sr,norm}.*
        """
    ),
)
LEAF = r"\.(?P<leaf>weight|bias)"


def stage(template: str) -> Template:
    """Released names count stages from 1: ``<s>`` is the group ``stage`` plus 1."""

    def rename(match: re.Match[str]) -> str:
        return match.expand(template).replace("<s>", str(int(match["stage"]) + 1))

    return rename


def huggingface_rules() -> tuple[Rule, ...]:
    """Rules for the names on disk, and for those that newer releases use in memory."""
    block = r"(?:encoder\.block\.(?P<stage>\d)\.|stages\.(?P<stage2>\d)\.blocks\.)(?P<block>\d+)\."

    def ours(rest: str) -> Template:
        def rename(match: re.Match[str]) -> str:
            number = int(match["stage"] or match["stage2"]) + 1
            return f"block{number}.{match['block']}.{rest}.{match['leaf']}"

        return rename

    reduction = r"attention\.(?:self|sequence_reduction)\."
    return (
        move(
            rf"(?:encoder\.patch_embeddings\.(?P<stage>\d)|stages\.(?P<stage2>\d)\.patch_embeddings)"
            rf"\.(?P<what>proj|layer_norm){LEAF}",
            lambda m: f"patch_embed{int(m['stage'] or m['stage2']) + 1}.{m['what'].removeprefix('layer_')}.{m['leaf']}",
        ),
        move(rf"encoder\.layer_norm\.(?P<stage>\d){LEAF}", stage(r"norm<s>.\g<leaf>")),
        move(rf"stages\.(?P<stage>\d)\.layer_norm{LEAF}", stage(r"norm<s>.\g<leaf>")),
        move(rf"{block}(?:layer_norm_1|layernorm_before){LEAF}", ours("norm1")),
        move(rf"{block}(?:layer_norm_2|layernorm_after){LEAF}", ours("norm2")),
        move(rf"{block}attention\.(?:self\.query|q_proj){LEAF}", ours("attn.q")),
        join(rf"{block}attention\.self\.(?P<part>key|value){LEAF}", ours("attn.kv"), ("key", "value")),
        join(rf"{block}attention\.(?P<part>[kv])_proj{LEAF}", ours("attn.kv"), ("k", "v")),
        move(rf"{block}{reduction}(?:sr|sequence_reduction){LEAF}", ours("attn.sr")),
        move(rf"{block}{reduction}layer_norm{LEAF}", ours("attn.norm")),
        move(rf"{block}attention\.(?:output\.dense|o_proj){LEAF}", ours("attn.proj")),
        move(rf"{block}mlp\.(?:dense1|fc1){LEAF}", ours("mlp.fc1")),
        move(rf"{block}mlp\.(?:dense2|fc2){LEAF}", ours("mlp.fc2")),
        move(rf"{block}mlp\.dwconv\.dwconv{LEAF}", ours("mlp.dwconv.dwconv")),
    )


def as_linear(x: Tensor) -> Tensor:
    """Turn the weight of a 1x1 convolution into that of a linear layer; a bias is unchanged."""
    return x.flatten(1) if x.ndim > 1 else x


def openmmlab_rules() -> tuple[Rule, ...]:
    """Stage s of OpenMMLab is ``layers.s`` with patch embedding 0, blocks 1 and norm 2."""
    block = r"layers\.(?P<stage>\d)\.1\.(?P<block>\d+)\."
    ours = r"block<s>.\g<block>."
    attention = rf"{block}attn\.attn\."
    return (
        move(rf"layers\.(?P<stage>\d)\.0\.projection{LEAF}", stage(r"patch_embed<s>.proj.\g<leaf>")),
        move(rf"layers\.(?P<stage>\d)\.0\.norm{LEAF}", stage(r"patch_embed<s>.norm.\g<leaf>")),
        move(rf"layers\.(?P<stage>\d)\.2{LEAF}", stage(r"norm<s>.\g<leaf>")),
        move(rf"{block}norm(?P<n>[12]){LEAF}", stage(rf"{ours}norm\g<n>.\g<leaf>")),
        split(
            rf"{attention}in_proj_(?P<leaf>weight|bias)",
            stage(rf"{ours}attn.q.\g<leaf>"),
            *[stage(rf"{ours}attn.kv.\g<leaf>")] * 2,
        ),
        move(rf"{attention}out_proj{LEAF}", stage(rf"{ours}attn.proj.\g<leaf>")),
        move(rf"{block}attn\.(?P<what>sr|norm){LEAF}", stage(rf"{ours}attn.\g<what>.\g<leaf>")),
        # The two linear layers are 1x1 convolutions there.
        move(rf"{block}ffn\.layers\.0{LEAF}", stage(rf"{ours}mlp.fc1.\g<leaf>"), as_linear),
        move(rf"{block}ffn\.layers\.1{LEAF}", stage(rf"{ours}mlp.dwconv.dwconv.\g<leaf>")),
        move(rf"{block}ffn\.layers\.4{LEAF}", stage(rf"{ours}mlp.fc2.\g<leaf>"), as_linear),
    )


PARTS = (
    Part(
        "MiT, Hugging Face layout",
        "hf-segformer",
        (r"(encoder\.patch_embeddings\.0|stages\.0\.patch_embeddings)\.proj\.weight",),
        huggingface_rules(),
        NAMES,
    ),
    Part(
        "MiT, OpenMMLab layout",
        "mmseg",
        (r"layers\.0\.0\.projection\.weight", r"layers\.0\.1\.0\.attn\.attn\.in_proj_weight"),
        openmmlab_rules(),
        NAMES,
    ),
    Part(
        "MiT",
        "segformer",
        (r"patch_embed1\.proj\.weight", r"block1\.0\.attn\.kv\.weight"),
        (drop(r"head\.(weight|bias)", "classifier"),),
        NAMES,
    ),
)
