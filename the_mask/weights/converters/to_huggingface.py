"""Writes encoder-only models as folders for transformers: ``config.json`` and ``model.safetensors``.

The model types are ``eomt``, ``videomt`` (queries are carried from frame to frame) and ``eomt_dinov3``. The package
transformers is not needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from the_mask.data.files import atomic_write
from the_mask.data.tensor_files import safetensors_bytes
from the_mask.modeling.mask.encoder_segmentor import EncoderSegmentor

ARCHITECTURES = {
    "eomt": "EomtForUniversalSegmentation",
    "videomt": "VideomtForUniversalSegmentation",
    "eomt_dinov3": "EomtDinov3ForUniversalSegmentation",
}
_HEAD = (
    (r"q\.weight", "query.weight"),
    (r"class_head\.(\w+)", r"class_predictor.\1"),
    (r"mask_head\.0\.(\w+)", r"mask_head.fc1.\1"),
    (r"mask_head\.2\.(\w+)", r"mask_head.fc2.\1"),
    (r"mask_head\.4\.(\w+)", r"mask_head.fc3.\1"),
    (r"upscale\.(\d+)\.(conv[12]\.\w+)", r"upscale_block.block.\1.\2"),
    (r"upscale\.(\d+)\.norm\.(\w+)", r"upscale_block.block.\1.layernorm2d.\2"),
    (r"(query_updater\.\w+)", r"\1"),
)


def save_huggingface(model: EncoderSegmentor, folder: Path, class_names: Sequence[str] | None = None) -> str:
    """Write a model's weights for transformers.

    Args:
        model: a model whose encoder's last blocks see the queries.
        folder: created if needed; its parent must exist.
        class_names: K names for the config; None numbers the classes.

    Returns:
        The model type.

    Raises:
        ValueError: transformers does not have this model.
    """
    config = huggingface_config(model, class_names)
    state = {name: value.contiguous().clone() for name, value in huggingface_state(model).items()}
    folder.mkdir(exist_ok=True)
    atomic_write(folder / "model.safetensors", safetensors_bytes(state, {"format": "pt"}))
    atomic_write(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    return config["model_type"]


def model_type(model: EncoderSegmentor) -> str:
    """The model type in transformers.

    Raises:
        ValueError: transformers does not have this model.
    """
    if not isinstance(model, EncoderSegmentor) or model.sem_seg_head.decoder is not None:
        raise ValueError("transformers has EoMT, EoMT-DINOv3 and VidEoMT: an EncoderSegmentor without a frozen decoder")
    dinov3 = _is_dinov3(model)
    if dinov3 and model.propagates:
        raise ValueError("transformers has no VidEoMT on DINOv3, only on DINOv2")
    if model.propagates and (model.options.norm_queries or model.options.class_logits == "whole-video"):
        raise ValueError("transformers' VidEoMT carries queries without the norm: MODEL.ENCODER.NORM_QUERIES False")
    return "eomt_dinov3" if dinov3 else "videomt" if model.propagates else "eomt"


def _is_dinov3(model: EncoderSegmentor) -> bool:
    return getattr(model.backbone.model, "rope", None) is not None


def huggingface_config(model: EncoderSegmentor, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """Content of ``config.json``."""
    kind, vit = model_type(model), model.backbone.model
    names = list(class_names or (f"class {i}" for i in range(model.num_classes)))
    if len(names) != model.num_classes:
        raise ValueError(f"{len(names)} class names for {model.num_classes} classes")
    block = vit.blocks[0]
    gated = not hasattr(block.mlp, "fc1") or block.mlp.fc1.out_features != block.mlp.fc2.in_features
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "layer_norm_eps": vit.norm.eps,
        "image_size": vit.patch_embed.img_size[0],
        "patch_size": model.patch_size,
        "num_upscale_blocks": len(model.sem_seg_head.upscale),
        "num_blocks": model.num_blocks,
        "num_queries": model.sem_seg_head.num_queries,
        "num_register_tokens": vit.num_prefix_tokens - 1,
        "hidden_act": "gelu",
        "dtype": "float32",
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    if kind == "eomt_dinov3":
        if gated:
            raise ValueError("transformers' EoMT-DINOv3 has one activation for gate and heads; a gated encoder has two")
        config |= {"intermediate_size": block.mlp.fc1.out_features, "use_gated_mlp": False}
        config |= {"query_bias": True, "key_bias": False, "value_bias": True, "pos_embed_rescale": None}
        return config
    return config | {"mlp_ratio": 4 if gated else block.mlp.fc1.out_features // vit.embed_dim, "use_swiglu_ffn": gated}


def huggingface_state(model: EncoderSegmentor) -> dict[str, Tensor]:
    """The state dict under transformers' names."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("sem_seg_head."):
            own = name.removeprefix("sem_seg_head.")
            for pattern, theirs in _HEAD:
                if re.fullmatch(pattern, own):
                    result[re.sub(pattern, theirs, own)] = value
    # transformers also masks the attention at inference, with this probability.
    result["attn_mask_probs"] = torch.zeros(model.num_blocks)
    if model.propagates:
        result["embeddings.mask_token"] = torch.zeros(1, 1, model.backbone.width)
    result["criterion.empty_weight"] = state["criterion.empty_weight"]
    vit = {name.removeprefix("backbone.model."): value for name, value in state.items() if name.startswith("backbone.")}
    return result | (_dinov3_state(vit) if _is_dinov3(model) else _vit_state(vit, model.backbone.num_prefix_tokens))


def _vit_state(vit: dict[str, Tensor], prefix: int) -> dict[str, Tensor]:
    cls, table = vit["cls_token"], vit["pos_embed"][0]
    width = cls.shape[-1]
    registers = vit.get("reg_token", cls.new_zeros(1, 0, width))
    side = round((len(table) - prefix) ** 0.5)
    if side * side == len(table) - prefix and len(table) != round(len(table) ** 0.5) ** 2:
        # The table has rows for the prefix tokens, but that of transformers does not: add them to the tokens.
        cls, registers = cls + table[:1], registers + table[1:prefix]
        table = table[prefix:]
    result = {
        "embeddings.cls_token": cls,
        "embeddings.register_tokens": registers,
        "embeddings.position_embeddings.weight": table,
        "embeddings.patch_embeddings.projection.weight": vit["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": vit["patch_embed.proj.bias"],
        "layernorm.weight": vit["norm.weight"],
        "layernorm.bias": vit["norm.bias"],
    }
    for i in range(_depth(vit)):
        ours, theirs = f"blocks.{i}.", f"layers.{i}."
        result |= _common(vit, ours, theirs)
        for leaf in ("weight", "bias"):
            for part, value in zip("qkv", vit[f"{ours}attn.qkv.{leaf}"].chunk(3), strict=True):
                result[f"{theirs}attention.{part}_proj.{leaf}"] = value
            result[f"{theirs}attention.out_proj.{leaf}"] = vit[f"{ours}attn.proj.{leaf}"]
            first, last = vit[f"{ours}mlp.fc1.{leaf}"], vit[f"{ours}mlp.fc2.{leaf}"]
            gated = len(vit[f"{ours}mlp.fc1.bias"]) != vit[f"{ours}mlp.fc2.weight"].shape[1]
            if gated:
                gate, up = first.chunk(2)
                result |= {f"{theirs}mlp.gate_proj.{leaf}": gate, f"{theirs}mlp.up_proj.{leaf}": up}
                result[f"{theirs}mlp.down_proj.{leaf}"] = last
            else:
                result |= {f"{theirs}mlp.fc1.{leaf}": first, f"{theirs}mlp.fc2.{leaf}": last}
        for number in (1, 2):
            scale = vit.get(f"{ours}ls{number}.gamma", torch.ones(width))
            result[f"{theirs}layer_scale{number}.lambda1"] = scale
    return result


def _dinov3_state(vit: dict[str, Tensor]) -> dict[str, Tensor]:
    width = vit["cls_token"].shape[-1]
    result = {
        "embeddings.cls_token": vit["cls_token"],
        "embeddings.register_tokens": vit["reg_token"],
        "embeddings.patch_embeddings.weight": vit["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.bias": vit["patch_embed.proj.bias"],
        "layernorm.weight": vit["norm.weight"],
        "layernorm.bias": vit["norm.bias"],
    }
    for i in range(_depth(vit)):
        ours, theirs = f"blocks.{i}.", f"layers.{i}."
        result |= _common(vit, ours, theirs)
        for part, value in zip("qkv", vit[f"{ours}attn.qkv.weight"].chunk(3), strict=True):
            result[f"{theirs}attention.{part}_proj.weight"] = value
        for part in "qv":
            bias = vit.get(f"{ours}attn.{part}_bias", torch.zeros(width))
            result[f"{theirs}attention.{part}_proj.bias"] = bias
        for leaf in ("weight", "bias"):
            result[f"{theirs}attention.o_proj.{leaf}"] = vit[f"{ours}attn.proj.{leaf}"]
            result[f"{theirs}mlp.up_proj.{leaf}"] = vit[f"{ours}mlp.fc1.{leaf}"]
            result[f"{theirs}mlp.down_proj.{leaf}"] = vit[f"{ours}mlp.fc2.{leaf}"]
        for number in (1, 2):
            result[f"{theirs}layer_scale{number}.lambda1"] = vit[f"{ours}gamma_{number}"]
    return result


def _common(vit: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    names = [f"norm{number}.{leaf}" for number in (1, 2) for leaf in ("weight", "bias")]
    return {theirs + name: vit[ours + name] for name in names}


def _depth(vit: dict[str, Tensor]) -> int:
    return 1 + max(int(match[1]) for name in vit if (match := re.match(r"blocks\.(\d+)\.", name)))
