"""BEiT with the pyramid of its segmentation code: original (and timm's) names, and OpenMMLab's."""

from __future__ import annotations

from the_mask.weights.converters.parts import BOOKKEEPING, Part
from the_mask.weights.converters.rules import Names, Rule, drop, move

NAMES = (
    Names(
        """
        model.cls_token model.patch_embed.proj.*
        model.blocks.#.{norm1,norm2,attn.proj,mlp.fc1,mlp.fc2}.*
        model.blocks.#.{gamma_1,gamma_2,attn.qkv.weight,attn.q_bias,attn.v_bias}
        model.blocks.#.attn.relative_position_bias_table
        """
    ),
    Names("fpn.0.{0,1,3}.* fpn.0.1.{running_mean,running_var} fpn.1.*", optional=True),
)

_COMMON: tuple[Rule, ...] = (
    drop(r".*\.relative_position_index", "computed from the sizes"),
    drop(r"(norm|fc_norm|head|ln1|lm_head)\.(weight|bias)", "classifier"),
    drop(r"mask_token", "of self-supervised training"),
    drop(BOOKKEEPING, "bookkeeping"),
    move(r"cls_token", "model.cls_token"),
)

PARTS = (
    Part(
        "BEiT, OpenMMLab layout",
        "mmseg",
        (
            r"layers\.0\.ln1\.weight",
            r"layers\.0\.attn\.relative_position_bias_table",
            r"patch_embed\.projection\.weight",
        ),
        (
            *_COMMON,
            move(r"patch_embed\.projection\.(weight|bias)", r"model.patch_embed.proj.\1"),
            move(r"layers\.(\d+)\.ln([12])\.(weight|bias)", r"model.blocks.\1.norm\2.\3"),
            move(r"layers\.(\d+)\.ffn\.layers\.0\.0\.(weight|bias)", r"model.blocks.\1.mlp.fc1.\2"),
            move(r"layers\.(\d+)\.ffn\.layers\.1\.(weight|bias)", r"model.blocks.\1.mlp.fc2.\2"),
            move(r"layers\.(\d+\.(?:attn|gamma).*)", r"model.blocks.\1"),
            move(r"neck\.upsample_4x\.([013]\..*)", r"fpn.0.\1"),
            move(r"neck\.upsample_2x\.(?:0\.)?(weight|bias)", r"fpn.1.\1"),
        ),
        NAMES,
    ),
    Part(
        "BEiT, original or timm layout",
        "beit",
        (r"blocks\.0\.attn\.q_bias", r"blocks\.0\.gamma_1", r"cls_token"),
        (
            *_COMMON,
            move(r"(patch_embed\.proj|blocks)\.(.*)", r"model.\1.\2"),
            move(r"fpn1\.([013]\..*)", r"fpn.0.\1"),
            move(r"fpn2\.0\.(weight|bias)", r"fpn.1.\1"),
        ),
        NAMES,
        unlike=(r"rel_pos_bias\..*", r"pos_embed"),
    ),
    Part("BEiT", "native", (r"model\.blocks\.0\.attn\.q_bias",), (), NAMES),
)
