"""State dicts of THE-Mask's two stages: start stage 2 from stage 1, and the names of the released checkpoints.

Source: spec sections 3, 6 and 9.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# Heads of stage 1 and the frame branch's copy of each. The clip branch keeps the names of stage 1.
_COPIES = {"decoder_norm": "frame_norm", "class_embed": "frame_class_embed", "mask_embed": "frame_mask_embed"}
_STAGE2_ONLY = ("temporal_layer", *_COPIES.values())

_RELEASED_TEMPORAL = "deformabel_transformer_cross_attention_layers"
# Module names under "predictor" in the released video checkpoints, and ours; None: unused, dropped.
RELEASED_NAMES: dict[str, str | None] = {
    "decoder_norm1": "decoder_norm",
    "decoder_norm2": "frame_norm",
    "class_embed_aux": "frame_class_embed",
    "mask_embed_aux": "frame_mask_embed",
    **{
        f"{_RELEASED_TEMPORAL}.{released}": ours and f"temporal_layer.{ours}"
        for released, ours in {
            "self_attn": "clip_self_attn",
            "norm2": "clip_self_norm",
            "self_attn_box": "frame_self_attn",
            "norm2_box": "frame_self_norm",
            "cross_attn": "frame_cross_attn",
            "norm1_box": "frame_cross_norm",
            "linear1_box": "frame_ffn.linear1",
            "linear2_box": "frame_ffn.linear2",
            "norm3_box": "frame_ffn_norm",
            "time_attention_weights": "frame_score",
            "time_attention": "frame_value",
            "norm1": "combine_norm",
            "linear1": "clip_ffn.linear1",
            "linear2": "clip_ffn.linear2",
            "norm3": "clip_ffn_norm",
            "reference_points": None,
        }.items()
    },
}


def rename_released(name: str) -> str | None:
    """Our name of a released decoder's parameter, both without the prefix ``...predictor.``; None: dropped."""
    for released, ours in RELEASED_NAMES.items():
        if name.startswith(f"{released}."):
            return ours and ours + name[len(released) :]
    return name


def stage1_to_stage2(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make the initial weights of stage 2 from a one-frame model: both branches start with its norm and heads.

    The released code initialises the frame branch at random; copying gives both branches a trained head. The temporal
    layer has no counterpart, so it is not in the result and starts from its own initialisation.

    Args:
        state_dict: names as in ``MaskClassifier`` (``sem_seg_head.predictor....``) or of a bare decoder. Not changed.

    Returns:
        all entries, plus a copy of each head entry under the frame branch's name.

    Raises:
        ValueError: a checkpoint that already has temporal parts, or one without a one-frame decoder.
    """
    prefix = _predictor_prefix(state_dict)
    local = {name.removeprefix(prefix): name for name in state_dict if name.startswith(prefix)}
    stage2 = sorted(name for name in local if name.split(".")[0] in _STAGE2_ONLY)
    if stage2:
        raise ValueError(
            f"a stage-2 start needs a one-frame checkpoint; this one already has {prefix}{stage2[0]}"
            f" ({len(stage2)} temporal entries): set MODEL.THE_MASK.INIT_FROM_STAGE1 to False to continue from it"
        )
    missing = [head for head in _COPIES if not any(name.split(".")[0] == head for name in local)]
    if missing or "query_feat.weight" not in local:
        raise ValueError(
            f"a stage-2 start needs a one-frame mask-classification checkpoint; this one has no"
            f" {', '.join(missing or ['query_feat'])} under {prefix or 'its top level'};"
            f" first names: {', '.join(list(state_dict)[:3]) or 'none'}"
        )
    result = dict(state_dict)
    for name, full_name in local.items():
        head, _, rest = name.partition(".")
        if head in _COPIES:
            result[f"{prefix}{_COPIES[head]}.{rest}"] = state_dict[full_name].clone()
    return result


def _predictor_prefix(state_dict: Mapping[str, Tensor]) -> str:
    """Everything up to the decoder's own names: "sem_seg_head.predictor.", or "" for a bare decoder."""
    for name in state_dict:
        before, found, _ = name.partition("predictor.")
        if found:
            return before + found
    return ""
