"""Foreign layouts of weights that the converters' tests make, from key tables."""

import re

import torch
from detectron2.modeling import build_backbone, build_model
from torch import nn

import the_mask.modeling  # noqa: F401
from the_mask.config import load_config
from the_mask.weights.converters import check, convert

SMALL_HEAD = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 32),
    *("MODEL.SEM_SEG_HEAD.MASK_DIM", 32),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 2),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD", 48),
    *("MODEL.MASK_FORMER.HIDDEN_DIM", 32),
    *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 4),
    *("MODEL.MASK_FORMER.DIM_FEEDFORWARD", 40),
    *("MODEL.MASK_FORMER.DEC_LAYERS", 4),
]
# Narrow, but with bottlenecks.
R50 = [
    *("MODEL.RESNETS.DEPTH", 50),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 8),
    *("MODEL.RESNETS.NORM", "FrozenBN"),
]
MIT = [*("MODEL.BACKBONE.NAME", "build_mit_backbone"), *("MODEL.MIT.VARIANT", "B0")]
INTERNIMAGE = [
    *("MODEL.BACKBONE.NAME", "build_internimage_backbone"),
    *("MODEL.INTERNIMAGE.CHANNELS", 16),
    *("MODEL.INTERNIMAGE.DEPTHS", "[1,1,2,1]"),
]
BEIT = [
    *("MODEL.BACKBONE.NAME", "build_beit_backbone"),
    *("MODEL.BEIT.NAME", "beit_base_patch16_224"),
    *("MODEL.BEIT.OUT_INDICES", "[0,1,2,3]"),
    *("MODEL.BEIT.IMG_SIZE", 64),
    *("MODEL.BEIT.NORM", "BN"),
]


def backbone(*overrides, device="meta") -> nn.ModuleDict:
    """A backbone; on the meta device where only its names and shapes are asked for."""
    cfg = load_config(None, ["MODEL.DEVICE", "cpu", *overrides])
    with torch.device(device):
        return nn.ModuleDict({"backbone": build_backbone(cfg)}).eval()


def timm_backbone(name, out_norm="LN", device="meta"):
    overrides = ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", name, "MODEL.TIMM.OUT_NORM", out_norm]
    return backbone(*overrides, device=device)


def noise(state):
    """The same names and shapes, with numbers that differ within a tensor and between tensors."""
    return {
        name: torch.arange(value.numel(), dtype=torch.float32).view(value.shape) + 0.37 * i
        for i, (name, value) in enumerate(state.items())
        if not name.endswith("num_batches_tracked")
    }


def rename(state, *pairs):
    """Apply ``re.sub`` pairs to every name: how the foreign dicts are made, from the key tables."""
    out = {}
    for name, value in state.items():
        for pattern, new in pairs:
            name = re.sub(pattern, new, name)
        out[name] = value
    return out


def assert_converts(foreign, native, ignored=()):
    """``foreign`` becomes exactly ``native``; converting that again changes nothing."""
    result = check(convert(foreign, "foreign"))
    assert not result.unknown
    assert set(result.ignored) == set(ignored)
    assert set(result.state) == set(native)
    assert [name for name, value in native.items() if not torch.equal(result.state[name], value)] == []
    again = check(convert(result.state, "native"))
    assert set(again.state) == set(result.state)
    assert all(again.state[name] is value for name, value in result.state.items())
    assert not again.ignored
    return result


def original_swin(native):
    """microsoft/Swin: patch merging is at the end of a stage; tables and classifier ride along."""
    moved = {}
    for name, value in native.items():
        name = name.removeprefix("backbone.").removeprefix("model.")
        moved[re.sub(r"layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) - 1}.down", name)] = value
    return moved


MM_SWIN = (
    (r"^backbone\.model\.", "backbone."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"layers\.(\d)\.blocks", r"stages.\1.blocks"),
    (r"\.attn\.(qkv|proj|rel)", r".attn.w_msa.\1"),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
)


def openmmlab_swin(native):
    out = {}
    for name, value in rename(native, *MM_SWIN).items():
        if "downsample" in name:
            name = re.sub(r"layers\.(\d)\.down", lambda m: f"stages.{int(m[1]) - 1}.down", name)
            pixels = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
            value = pixels.transpose(-1, -2).flatten(-2)
        out[name] = value
    return out


def segmentor(*overrides):
    return build_model(load_config(None, [*SMALL_HEAD, *overrides])).eval()
