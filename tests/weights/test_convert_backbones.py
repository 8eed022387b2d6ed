"""Published backbones to our names: layouts built from their key tables or by other programs' own code."""

import pickle
import re

import numpy as np
import pytest
import timm
import torch
from converter_cases import (
    BEIT,
    INTERNIMAGE,
    MIT,
    R50,
    assert_converts,
    backbone,
    noise,
    openmmlab_swin,
    original_swin,
    rename,
    timm_backbone,
)
from torch import nn

import the_mask.modeling  # noqa: F401
from the_mask.weights import load_weights
from the_mask.weights.converters import check, convert
from the_mask.weights.converters.rules import Names, absent, expand
from the_mask.weights.converters.tables import fit_position_tables

# --- the rules ---------------------------------------------------------------------------------------------------


def test_templates():
    assert sorted(expand("a{0..2}.{b,c.{d,e}}")) == [f"a{i}.{x}" for i in range(3) for x in ("b", "c.d", "c.e")]
    assert expand("n.*") == ["n.weight", "n.bias"]
    group = Names("x.#.{a,b} y.#d.a z.#d.a")
    assert absent([group], ["x.0.a", "x.0.b", "y.0.a", "z.0.a"]) == []
    assert absent([group], ["x.0.a", "x.2.b", "y.0.a", "y.1.a", "z.0.a"]) == [
        "x.1.a",
        "x.2.a",
        "x.0.b",
        "x.1.b",
        "z.1.a",
    ]
    assert absent([group], ["x.0.a", "x.0.b"]) == ["y.#.a", "z.#.a"]
    optional = Names("n{0..1}.*", optional=True)
    assert absent([optional], []) == []
    assert absent([optional], ["n0.weight"]) == ["n0.bias", "n1.weight", "n1.bias"]


# --- backbones ---------------------------------------------------------------------------------------------------


def test_swin_original_and_timm(swin):
    extra = {
        "head.weight": torch.zeros(9, 768),
        "norm.weight": torch.zeros(768),
        "layers.0.blocks.1.attn_mask": torch.zeros(4, 49, 49),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49),
    }
    assert_converts({**original_swin(swin), **extra}, swin, extra)
    bare = {name.removeprefix("backbone.model."): v for name, v in swin.items() if ".norm" not in name[:14]}
    assert_converts(bare, {f"backbone.model.{name}": v for name, v in bare.items()})


def test_swin_agrees_with_timms_own_converter():
    """timm reads the original layout too."""
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
    state = noise({name: value for name, value in model.state_dict().items() if not name.startswith("norm")})
    native = {f"backbone.model.{name}": value for name, value in state.items()}
    original = original_swin(native)
    theirs = timm.models.swin_transformer.checkpoint_filter_fn(dict(original), model)
    ours = check(convert(original)).state
    assert {f"backbone.model.{name}" for name in theirs} == set(ours)
    assert all(torch.equal(ours[f"backbone.model.{name}"], value) for name, value in theirs.items())


def test_patch_merging_order():
    """OpenMMLab merges patches by ``nn.Unfold``: its weights, converted, give timm's layer the same output."""
    merge = timm.models.swin_transformer.PatchMerging(6)
    norm, reduction = nn.LayerNorm(24), nn.Linear(24, 12, bias=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 4, 6)
    expected = reduction(norm(nn.Unfold(2, stride=2)(x.permute(0, 3, 1, 2)).transpose(1, 2))).unflatten(1, (4, 2))
    stages = {
        "patch_embed.projection.weight": torch.zeros(1),
        "stages.0.blocks.0.attn.w_msa.qkv.weight": torch.zeros(3),
    }
    stages |= {f"stages.0.downsample.norm.{n}": getattr(norm, n).data for n in ("weight", "bias")}
    stages["stages.0.downsample.reduction.weight"] = reduction.weight.data
    converted = convert({f"backbone.{n}": v for n, v in stages.items()} | {"decode_head.x": torch.zeros(1)}).state
    prefix = "backbone.model.layers.1.downsample."
    merge.load_state_dict({n.removeprefix(prefix): v for n, v in converted.items() if n.startswith(prefix)})
    torch.testing.assert_close(merge(x), expected)


def test_swin_openmmlab(swin):
    foreign = openmmlab_swin(swin)
    extra = {"backbone.stages.0.blocks.0.attn.w_msa.relative_position_index": torch.zeros(49, 49)}
    head = {"decode_head.odd.weight": torch.zeros(1)}
    result = assert_converts({**foreign, **extra, **head}, swin, [*extra, *head])
    assert result.ignored["decode_head.odd.weight"] == "this project has no such head"


def test_convnext():
    native = noise(timm_backbone("convnext_atto").state_dict())
    original = rename(
        native,
        (r"^backbone\.(model\.)?", ""),
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample", r"downsample_layers.\1"),
        (r"\.blocks\.", "."),
        (r"conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
    )
    assert "stages.0.0.pwconv1.weight" in original
    assert "downsample_layers.1.0.weight" in original
    # convnext_atto's pointwise layers are convolutions in timm; its own filter makes them so.
    original = {n: v.flatten(1) if "pwconv" in n and v.ndim == 4 else v for n, v in original.items()}
    native = {n: v.flatten(1) if "mlp.fc" in n and v.ndim == 4 else v for n, v in native.items()}
    extra = {"head.weight": torch.zeros(3, 320), "norm.bias": torch.zeros(320)}
    result = assert_converts({**original, **extra}, native, extra)
    model = timm.create_model("convnext_atto", num_classes=0)
    ours = {n.removeprefix("backbone.model."): v for n, v in result.state.items() if ".norm" not in n[:14]}
    theirs = timm.models.convnext.checkpoint_filter_fn(
        {n: v for n, v in original.items() if not n.startswith("norm") and v.ndim != 2}, model
    )
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())

    mm = rename(original, (r"^", "backbone."), (r"dwconv", "depthwise_conv"), (r"pwconv", "pointwise_conv"))
    mm = {n: v[..., None, None] if "pointwise" in n and v.ndim == 2 else v for n, v in mm.items()}
    assert_converts({**mm, "decode_head.a": torch.zeros(1)}, native, ["decode_head.a"])


@pytest.fixture(scope="module")
def beit():
    return noise(backbone(*BEIT).state_dict())


def test_beit(beit):
    original = rename(beit, (r"^backbone\.", ""), (r"^model\.", ""), (r"^fpn\.0\.", "fpn1."), (r"^fpn\.1\.", "fpn2.0."))
    counters = {"fpn1.1.num_batches_tracked": torch.tensor(3)}
    extra = {"blocks.0.attn.relative_position_index": torch.zeros(17, 17), "head.bias": torch.zeros(2)}
    assert_converts({**original, **extra, **counters}, beit, [*extra, *counters])
    mm = rename(
        {f"backbone.{name}": v for name, v in original.items()},
        (r"\.blocks\.", ".layers."),
        (r"\.norm([12])\.", r".ln\1."),
        (r"\.mlp\.fc1", ".ffn.layers.0.0"),
        (r"\.mlp\.fc2", ".ffn.layers.1"),
        (r"patch_embed\.proj\.", "patch_embed.projection."),
        (r"^backbone\.fpn1\.", "neck.upsample_4x."),
        (r"^backbone\.fpn2\.", "neck.upsample_2x."),
    )
    assert_converts({**mm, "decode_head.a": torch.zeros(1)}, beit, ["decode_head.a"])


def test_position_tables_of_another_size(beit, swin):
    """BEiT for 224 pixels (27² + 3 rows) to 64 (7² + 3): the middle of the table. Swin of window 12 to 7."""

    def with_tables(native, table):
        return {name: table if name.endswith("bias_table") else value for name, value in native.items()}

    large = torch.randn(27 * 27 + 3, 12)
    state, resized = fit_position_tables(with_tables(beit, large), beit)
    assert len(resized) == 4
    middle = torch.cat([large[:-3].view(27, 27, 12)[10:17, 10:17].flatten(0, 1), large[-3:]])
    assert all(torch.equal(state[name], middle) for name in resized)

    name = "backbone.model.layers.0.blocks.0.attn.relative_position_bias_table"
    state, resized = fit_position_tables({name: torch.full((23 * 23, 3), 3.0)}, swin)
    assert resized == [name]
    torch.testing.assert_close(state[name], torch.full((169, 3), 3.0))
    other_heads = {name: torch.zeros(23 * 23, 4)}
    assert fit_position_tables(other_heads, swin) == (other_heads, [])


def test_mit_released_and_openmmlab():
    native = noise(backbone(*MIT).state_dict())
    bare = {name.removeprefix("backbone."): v for name, v in native.items()}
    head = {"head.weight": torch.zeros(3, 256)}
    assert_converts({**bare, **head}, native, head)
    mm = {}
    for ours, value in native.items():
        name = re.sub(r"patch_embed(\d)\.proj", lambda m: f"layers.{int(m[1]) - 1}.0.projection", ours)
        name = re.sub(r"patch_embed(\d)\.norm", lambda m: f"layers.{int(m[1]) - 1}.0.norm", name)
        name = re.sub(r"block(\d)\.", lambda m: f"layers.{int(m[1]) - 1}.1.", name)
        name = re.sub(r"backbone\.norm(\d)", lambda m: f"backbone.layers.{int(m[1]) - 1}.2", name)
        name = name.replace("attn.proj", "attn.attn.out_proj").replace("mlp.fc2", "ffn.layers.4")
        name = name.replace("mlp.fc1", "ffn.layers.0").replace("mlp.dwconv.dwconv", "ffn.layers.1")
        if ".attn.kv." in name:
            continue
        if ".attn.q." in name:
            name = name.replace("attn.q.", "attn.attn.in_proj_")
            value = torch.cat([value, native[ours.replace("attn.q", "attn.kv")]])
        mm[name] = value[..., None, None] if re.search(r"ffn\.layers\.[04]\.weight", name) else value
    segformer_head = {f"decode_head.linear_{name}.weight": torch.zeros(1) for name in ("c1.proj", "pred")}
    assert_converts({**mm, **segformer_head}, native, segformer_head)
    released = {**native, **segformer_head}
    assert_converts(released, native, segformer_head)


@pytest.mark.parametrize("variant", ["T", "XL", "H", "G"])
def test_internimage(variant):
    overrides = list(INTERNIMAGE)
    if variant in "HG":
        overrides[3:] = [32, "MODEL.INTERNIMAGE.DEPTHS", "[1,1,6,1]"]
    native = noise(backbone("MODEL.INTERNIMAGE.VARIANT", variant, *overrides).state_dict())
    bare = {name.removeprefix("backbone."): v for name, v in native.items()}
    heads = [f"{name}.weight" for name in ("conv_head.0", "head", "dcnv3_head_x4.0", "dcnv3_head_x3.0", "fc_norm")]
    heads += ["clip_projector.norm1_q.weight"]
    assert_converts({**bare, **dict.fromkeys(heads, torch.zeros(1))}, native, heads)
    if variant == "T":
        # The classification release of T has no layer scales.
        without = {name: v for name, v in bare.items() if "gamma" not in name}
        assert_converts(without, {f"backbone.{name}": v for name, v in without.items()})


def test_resnet_v1c_openmmlab():
    native = noise(backbone("MODEL.BACKBONE.NAME", "build_resnet_d8_backbone", *R50[:2]).state_dict())
    foreign = {}
    for name, value in native.items():
        name = name.removeprefix("backbone.")
        for i, index in ((1, 0), (2, 3), (3, 6)):
            name = name.replace(f"stem.conv1_{i}.weight", f"stem.{index}.weight")
            name = name.replace(f"stem.conv1_{i}.norm.", f"stem.{index + 1}.")
        name = re.sub(r"res(\d)\.", lambda m: f"layer{int(m[1]) - 1}.", name)
        name = name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
        foreign[re.sub(r"conv(\d)\.norm\.", r"bn\1.", name)] = value
    extra = {"fc.weight": torch.zeros(1), "stem.1.num_batches_tracked": torch.tensor(4)}
    assert_converts({**foreign, **extra}, native, extra)


def test_resnet_of_detectron2_zoo(tmp_path):
    """R-50.pkl: bare Detectron2 names, numpy arrays, the classifier below the stem; opens without trust."""
    native = noise(backbone(*R50).state_dict())
    content = {n.removeprefix("backbone."): v.numpy() for n, v in native.items()}
    content["stem.fc.weight"] = np.zeros((3, 3), np.float32)
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"model": content, "__author__": "torchvision", "matching_heuristics": True}))
    model = backbone(*R50, device="cpu")
    report = load_weights(model, path, strict=True)
    assert list(report.ignored) == ["stem.fc.weight"]
    assert all(torch.equal(value, native[name]) for name, value in model.state_dict().items())
