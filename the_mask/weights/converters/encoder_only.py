"""Encoder-only models: released EoMT and VidEoMT, Hugging Face's ``eomt``, ``eomt_dinov3`` and ``videomt``; plain ViTs.

The encoder keeps timm's names and the head EoMT's; mostly, only the prefix differs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from the_mask.weights.converters.parts import Part
from the_mask.weights.converters.rules import Names, Rule, Template, drop, join, move

LEAF = r"\.(?P<leaf>weight|bias)"
# Tables of relative positions, which mark a BEiT.
RELATIVE = (r".*relative_position_bias_table", r".*rel_pos.*")

VIT_NAMES = (
    Names(
        """
        model.cls_token model.patch_embed.proj.* model.norm.*
        model.blocks.#.{norm1,norm2,attn.proj,mlp.fc2}.* model.blocks.#.attn.qkv.weight
        """
    ),
    *(
        Names(template, optional=True)
        for template in (
            "model.reg_token",
            "model.pos_embed",
            "model.blocks.#.attn.qkv.bias",
            "model.blocks.#.attn.{q,v}_bias",
            "model.blocks.#.ls{1,2}.gamma",
            "model.blocks.#.gamma_{1,2}",
            "model.blocks.#.mlp.fc1.*",
            "model.blocks.#.mlp.{fc1_g,fc1_x}.*",
        )
    ),
)
HEAD_NAMES = (
    Names(
        """
        q.weight class_head.* mask_head.{0,2,4}.* upscale.#.{conv1,norm}.* upscale.#.conv2.weight attn_mask_probs
        """
    ),
    Names("query_updater.*", optional=True),
)
# If the mean of a norm's scales is below this, they are changes and not weights.
LARGEST_CHANGE = 0.05
_IN_MODEL = r"(cls_token|reg_token|pos_embed|patch_embed\.proj\..*|blocks\..*|norm\..*)"

VIT = (
    Part(
        "plain ViT, timm layout",
        "timm-vit",
        (r"blocks\.0\.attn\.qkv\.weight", r"patch_embed\.proj\.weight", r"pos_embed|reg_token"),
        (
            drop(r"mask_token", "of self-supervised training"),
            drop(r"(head|fc_norm|head_dist|attn_pool)\..*", "classifier"),
            drop(r".*\.attn\.k_bias|rope\..*|.*\.bias_mask", "a constant"),
            move(_IN_MODEL, r"model.\1"),
        ),
        VIT_NAMES,
        unlike=RELATIVE,
    ),
    Part(
        "plain ViT",
        "native",
        (r"model\.blocks\.0\.attn\.qkv\.weight", r"model\.patch_embed\.proj\.weight", r"model\.(pos_embed|reg_token)"),
        (),
        VIT_NAMES,
        unlike=RELATIVE,
    ),
)
# The released code enlarges the masks of the queries before merging them into classes.
SETTINGS = (("MODEL.MASK_FORMER.MERGE_AT", "input"),)
_HEAD_MARKS = (r"q\.weight", r"class_head\.weight", r"mask_head\.0\.weight")
HEAD = (Part("encoder-only head", "native", _HEAD_MARKS, (), HEAD_NAMES),)
RELEASED_HEAD = (Part("encoder-only head", "eomt", _HEAD_MARKS, (), HEAD_NAMES, settings=SETTINGS),)


def holds_differences(state: Mapping[str, Tensor]) -> bool:
    """Whether a converted state holds changes to the encoder's weights, as the released DINOv3 models do.

    The scales of a network's norms are never all near 0, but their changes in a short training are.
    """
    scales = [
        value for name, value in state.items() if re.fullmatch(r"backbone\.model\.blocks\.\d+\.norm[12]\.weight", name)
    ]
    return bool(scales) and max(float(value.float().abs().mean()) for value in scales) < LARGEST_CHANGE


def add_base(
    state: Mapping[str, Tensor], base: Mapping[str, Tensor], source: str, base_source: str
) -> dict[str, Tensor]:
    """Encoder weights from their changes and the weights that they were added to; the heads started from 0.

    Args:
        state: of a file of changes, converted.
        base: of a file with the original encoder, converted.
        source, base_source: for messages.

    Raises:
        ValueError: the base is of another encoder.
    """
    encoder = [name for name in state if name.startswith("backbone.")]
    absent = [name for name in encoder if name not in base]
    differ = [name for name in encoder if name in base and base[name].shape != state[name].shape]
    for kind, names in (("lacks", absent), ("has other shapes for", differ)):
        if names:
            raise ValueError(
                f"{base_source} is not the encoder that {source} was trained from: it {kind} {len(names)} of "
                f"{len(encoder)} tensors, e.g. {names[0]}"
            )
    return {
        name: (base[name].float() + value.float()).to(base[name].dtype) if name in encoder else value
        for name, value in state.items()
    }


def _head_rules() -> tuple[Rule, ...]:
    numbers = {"1": "0", "2": "2", "3": "4"}

    def layer(match: re.Match[str]) -> str:
        return f"sem_seg_head.mask_head.{numbers[match['n']]}.{match['leaf']}"

    return (
        move(r"query\.weight", "sem_seg_head.q.weight"),
        move(rf"class_predictor{LEAF}", r"sem_seg_head.class_head.\g<leaf>"),
        move(rf"mask_head\.fc(?P<n>[123]){LEAF}", layer),
        move(r"upscale_block\.block\.(\d+)\.(conv[12]\.\w+)", r"sem_seg_head.upscale.\1.\2"),
        move(rf"upscale_block\.block\.(\d+)\.layernorm2d{LEAF}", r"sem_seg_head.upscale.\1.norm.\g<leaf>"),
        move(rf"query_updater{LEAF}", r"sem_seg_head.query_updater.\g<leaf>"),
        move(r"attn_mask_probs", "sem_seg_head.attn_mask_probs"),
    )


def _encoder_rules(dinov3: bool, gated: bool) -> tuple[Rule, ...]:
    layer, ours = r"layers\.(?P<i>\d+)\.", r"backbone.model.blocks.\g<i>."
    attention = rf"{layer}attention\."
    scale: Template = rf"{ours}gamma_\g<n>" if dinov3 else rf"{ours}ls\g<n>.gamma"
    rules = [
        move(r"embeddings\.cls_token", "backbone.model.cls_token"),
        move(r"embeddings\.register_tokens", "backbone.model.reg_token"),
        drop(r"embeddings\.mask_token", "of self-supervised training"),
        drop(r"(rope_embeddings|embeddings\.rope).*", "a constant"),
        move(r"embeddings\.position_embeddings\.weight", "backbone.model.pos_embed", _with_batch_axis),
        move(rf"embeddings\.patch_embeddings(?:\.projection)?{LEAF}", r"backbone.model.patch_embed.proj.\g<leaf>"),
        move(rf"layernorm{LEAF}", r"backbone.model.norm.\g<leaf>"),
        move(rf"{layer}norm(?P<n>[12]){LEAF}", rf"{ours}norm\g<n>.\g<leaf>"),
        join(rf"{attention}(?P<part>[qkv])_proj\.weight", rf"{ours}attn.qkv.weight", ("q", "k", "v")),
        move(rf"{attention}(?:out|o)_proj{LEAF}", rf"{ours}attn.proj.\g<leaf>"),
        move(rf"{layer}layer_scale(?P<n>[12])\.lambda1", scale),
        move(rf"{layer}mlp\.(?:fc2|down_proj|weights_out){LEAF}", rf"{ours}mlp.fc2.\g<leaf>"),
    ]
    if dinov3:
        # DINOv3's keys have no bias.
        rules.append(move(rf"{attention}(?P<part>[qv])_proj\.bias", rf"{ours}attn.\g<part>_bias"))
    else:
        rules.append(join(rf"{attention}(?P<part>[qkv])_proj\.bias", rf"{ours}attn.qkv.bias", ("q", "k", "v")))
    if gated and dinov3:
        rules.append(move(rf"{layer}mlp\.gate_proj{LEAF}", rf"{ours}mlp.fc1_g.\g<leaf>"))
        rules.append(move(rf"{layer}mlp\.up_proj{LEAF}", rf"{ours}mlp.fc1_x.\g<leaf>"))
    elif gated:
        parts = ("gate", "up")
        rules.append(join(rf"{layer}mlp\.(?P<part>gate|up)_proj{LEAF}", rf"{ours}mlp.fc1.\g<leaf>", parts))
        rules.append(move(rf"{layer}mlp\.weights_in{LEAF}", rf"{ours}mlp.fc1.\g<leaf>"))
    else:
        rules.append(move(rf"{layer}mlp\.(?:fc1|up_proj){LEAF}", rf"{ours}mlp.fc1.\g<leaf>"))
    return tuple(rules)


def _with_batch_axis(table: Tensor) -> Tensor:
    return table[None] if table.ndim == 2 else table


def _prefixed(groups: tuple[Names, ...], prefix: str) -> tuple[Names, ...]:
    return tuple(
        Names(" ".join(prefix + template for template in group.templates.split()), group.optional) for group in groups
    )


def _huggingface(title: str, dinov3: bool, gated: bool) -> Part:
    table, gate = r"embeddings\.position_embeddings\.weight", r"layers\.0\.mlp\.(gate_proj|weights_in)\.weight"
    marks = [r"upscale_block\.block\.0\.conv1\.weight", r"query\.weight"]
    unlike: list[str] = []
    for pattern, there in ((table, not dinov3), (gate, gated)):
        (marks if there else unlike).append(pattern)
    names = (*_prefixed(VIT_NAMES, "backbone."), *_prefixed(HEAD_NAMES, "sem_seg_head."))
    return Part(title, "hf-eomt", tuple(marks), (*_head_rules(), *_encoder_rules(dinov3, gated)), names, tuple(unlike))


HUGGINGFACE = (
    _huggingface("EoMT or VidEoMT, Hugging Face layout", dinov3=False, gated=False),
    _huggingface("EoMT or VidEoMT with a gated ViT, Hugging Face layout", dinov3=False, gated=True),
    _huggingface("EoMT on DINOv3, Hugging Face layout", dinov3=True, gated=False),
    _huggingface("EoMT on a gated DINOv3, Hugging Face layout", dinov3=True, gated=True),
)
