"""Published weights to our names: layouts built from their key tables or by other programs' own code, and bad input."""

import pickle
import re
from collections import OrderedDict
from itertools import product

import numpy as np
import pytest
import timm
import torch
from detectron2.modeling import build_backbone, build_model
from safetensors.torch import load_file, save_file
from torch import nn

import the_mask.modeling  # noqa: F401
from the_mask.config import load_config
from the_mask.engine import load_weights
from the_mask.engine.converters import FAMILIES, check, convert
from the_mask.engine.converters.files import convert_file
from the_mask.engine.converters.rules import Names, absent, expand
from the_mask.engine.converters.tables import fit_position_tables

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


def original_swin(native):
    """microsoft/Swin: patch merging is at the end of a stage; tables and classifier ride along."""
    moved = {}
    for name, value in native.items():
        name = name.removeprefix("backbone.").removeprefix("model.")
        moved[re.sub(r"layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) - 1}.down", name)] = value
    return moved


@pytest.fixture(scope="module")
def swin():
    return noise(timm_backbone("swin_tiny_patch4_window7_224").state_dict())


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


# --- whole models ------------------------------------------------------------------------------------------------


def segmentor(*overrides):
    return build_model(load_config(None, [*SMALL_HEAD, *overrides])).eval()


@pytest.fixture(scope="module")
def small_state():
    return noise(segmentor(*R50).state_dict())


def keys(table: str):
    """Names of a key table: ``{a,b}`` and ``{0-2}`` written out (an own reader, not the converters')."""
    for line in table.split():
        parts = re.split(r"\{([^}]*)\}", line)
        options = []
        for i, part in enumerate(parts):
            first, dash, last = part.partition("-")
            if i % 2 == 0:
                options.append([part])
            elif dash and first.isdigit():
                options.append([str(n) for n in range(int(first), int(last) + 1)])
            else:
                options.append(part.split(","))
        yield from ("".join(choice) for choice in product(*options))


HEAD_TABLE = """
pixel_decoder.input_proj.{0-2}.{0,1}.{weight,bias}
pixel_decoder.transformer.level_embed
pixel_decoder.transformer.encoder.layers.{0-1}.self_attn.{sampling_offsets,attention_weights}.{weight,bias}
pixel_decoder.transformer.encoder.layers.{0-1}.self_attn.{value_proj,output_proj}.{weight,bias}
pixel_decoder.transformer.encoder.layers.{0-1}.{norm1,norm2,linear1,linear2}.{weight,bias}
pixel_decoder.mask_features.{weight,bias}
pixel_decoder.{adapter_1,layer_1}.{weight,norm.weight,norm.bias}
predictor.transformer_self_attention_layers.{0-2}.self_attn.{in_proj_weight,in_proj_bias}
predictor.transformer_self_attention_layers.{0-2}.{self_attn.out_proj,norm}.{weight,bias}
predictor.transformer_cross_attention_layers.{0-2}.multihead_attn.{in_proj_weight,in_proj_bias}
predictor.transformer_cross_attention_layers.{0-2}.{multihead_attn.out_proj,norm}.{weight,bias}
predictor.transformer_ffn_layers.{0-2}.{linear1,linear2,norm}.{weight,bias}
predictor.{decoder_norm,class_embed}.{weight,bias}
predictor.mask_embed.layers.{0-2}.{weight,bias}
predictor.{query_feat,query_embed,level_embed}.weight
"""


def test_our_names_are_the_official_ones(small_state):
    assert {n for n in small_state if n.startswith("sem_seg_head.")} == {f"sem_seg_head.{n}" for n in keys(HEAD_TABLE)}


TRAPS = {
    "current": (),
    "first image release": ((r"query_feat", "static_query"),),
    "before version 2": ((r"pixel_decoder\.", ""),),
    "doubled by a metadata-trusting reader": ((r"pixel_decoder\.", "pixel_decoder.pixel_decoder."),),
    "oldest": ((r"query_feat", "static_query"), (r"pixel_decoder\.", "")),
}


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_official_mask2former(small_state, tmp_path, trap, suffix):
    foreign = rename(small_state, *TRAPS[trap])
    assert_converts(foreign, small_state)
    path = tmp_path / f"official{suffix}"
    if suffix == ".pkl":
        content = OrderedDict((n, v.numpy()) for n, v in foreign.items())
        path.write_bytes(pickle.dumps({"model": content, "__author__": "third_party", "iteration": np.int64(7)}))
    else:
        state = OrderedDict(foreign)
        state._metadata = OrderedDict({"": {"version": 1}, "sem_seg_head": {"version": 1}})
        torch.save({"model": state, "iteration": 3, "best": np.float64(0.4)}, path)
    model = segmentor(*R50)
    report = load_weights(model, path, strict=True)
    assert report.match == 1
    assert all(torch.equal(value, small_state[name]) for name, value in model.state_dict().items())
    text = convert_file(path, tmp_path / "native.safetensors")
    assert "Mask2Former head" in text
    stored = load_file(tmp_path / "native.safetensors")
    assert {n: v.shape for n, v in stored.items()} == {n: v.shape for n, v in small_state.items()}


def test_official_mask2former_swin(swin, small_state):
    head = {n: v for n, v in small_state.items() if not n.startswith("backbone.")}
    foreign = {f"backbone.{n}": v for n, v in original_swin(swin).items()}
    tables = {"backbone.layers.1.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}
    assert_converts({**foreign, **tables, **head}, {**swin, **head}, tables)


MM_HEAD = (
    (r"^sem_seg_head\.", "decode_head."),
    (r"input_proj\.(\d)\.0", r"input_convs.\1.conv"),
    (r"input_proj\.(\d)\.1", r"input_convs.\1.gn"),
    (r"adapter_1\.weight", "lateral_convs.0.conv.weight"),
    (r"adapter_1\.norm", "lateral_convs.0.gn"),
    (r"layer_1\.weight", "output_convs.0.conv.weight"),
    (r"layer_1\.norm", "output_convs.0.gn"),
    (r"transformer\.level_embed", "level_encoding.weight"),
    (r"mask_features", "mask_feature"),
    (r"predictor\.class_embed", "cls_embed"),
    (r"predictor\.mask_embed\.layers\.0", "mask_embed.0"),
    (r"predictor\.mask_embed\.layers\.1", "mask_embed.2"),
    (r"predictor\.mask_embed\.layers\.2", "mask_embed.4"),
    (r"predictor\.decoder_norm", "transformer_decoder.post_norm"),
    (r"predictor\.(query_feat|query_embed|level_embed)", r"\1"),
)
MM_LAYERS = {
    2: (
        (r"transformer\.encoder\.layers\.(\d)\.self_attn", r"encoder.layers.\1.attentions.0"),
        (r"transformer\.encoder\.layers\.(\d)\.linear1", r"encoder.layers.\1.ffns.0.layers.0.0"),
        (r"transformer\.encoder\.layers\.(\d)\.linear2", r"encoder.layers.\1.ffns.0.layers.1"),
        (r"transformer\.encoder\.layers\.(\d)\.norm1", r"encoder.layers.\1.norms.0"),
        (r"transformer\.encoder\.layers\.(\d)\.norm2", r"encoder.layers.\1.norms.1"),
        (
            r"predictor\.transformer_cross_attention_layers\.(\d)\.multihead_attn",
            r"D.\1.attentions.0.attn",
        ),
        (r"predictor\.transformer_cross_attention_layers\.(\d)\.norm", r"D.\1.norms.0"),
        (
            r"predictor\.transformer_self_attention_layers\.(\d)\.self_attn",
            r"D.\1.attentions.1.attn",
        ),
        (r"predictor\.transformer_self_attention_layers\.(\d)\.norm", r"D.\1.norms.1"),
        (r"predictor\.transformer_ffn_layers\.(\d)\.linear1", r"D.\1.ffns.0.layers.0.0"),
        (r"predictor\.transformer_ffn_layers\.(\d)\.linear2", r"D.\1.ffns.0.layers.1"),
        (r"predictor\.transformer_ffn_layers\.(\d)\.norm", r"D.\1.norms.2"),
    ),
}
MM_LAYERS[3] = (
    *MM_LAYERS[2],
    (r"pixel_decoder\.encoder(.*)attentions\.0", r"pixel_decoder.encoder\1self_attn"),
    (r"attentions\.0", "cross_attn"),
    (r"attentions\.1", "self_attn"),
    (r"ffns\.0", "ffn"),
)
MM_LAYERS = {release: (*pairs, (r"\bD\.", "transformer_decoder.layers.")) for release, pairs in MM_LAYERS.items()}


@pytest.mark.parametrize("release", [2, 3])
@pytest.mark.parametrize("prefix", ["decode_head.", "panoptic_head."])
def test_openmmlab_mask2former(small_state, release, prefix):
    """InternImage's release: its own backbone names and mmdet's head."""
    native = {n: v for n, v in small_state.items() if n.startswith("sem_seg_head.")}
    foreign = rename(native, *MM_HEAD, *MM_LAYERS[release], (r"^decode_head\.", prefix))
    assert f"{prefix}pixel_decoder.level_encoding.weight" in foreign
    assert not any("predictor" in name for name in foreign)
    spine = noise(backbone("MODEL.INTERNIMAGE.VARIANT", "T", *INTERNIMAGE).state_dict())
    unused = {f"{prefix}conv_seg.weight": torch.zeros(1)}
    assert_converts({**spine, **foreign, **unused}, {**spine, **native}, unused)


def test_the_mask_both_stages():
    """mmseg files: ``decode_head.`` in front, video names that differ, an unused classifier and linear layer."""
    spine = noise(backbone(*MIT).state_dict())
    for decoder in ("MaskedAttentionDecoder", "TemporalAggregationDecoder"):
        model = segmentor(*R50, "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", decoder)
        native = {n: v for n, v in noise(model.state_dict()).items() if not n.startswith("backbone.")}
        foreign = rename(
            native,
            (r"^(sem_seg_head\.|(?=criterion))", "decode_head."),
            (r"temporal_layer\.", "TL."),
            (r"\bTL\.clip_self_attn", "TL.self_attn"),
            (r"\bTL\.clip_self_norm", "TL.norm2"),
            (r"\bTL\.frame_self_attn", "TL.self_attn_box"),
            (r"\bTL\.frame_self_norm", "TL.norm2_box"),
            (r"\bTL\.frame_cross_attn", "TL.cross_attn"),
            (r"\bTL\.frame_cross_norm", "TL.norm1_box"),
            (r"\bTL\.frame_ffn\.(linear\d)", r"TL.\1_box"),
            (r"\bTL\.frame_ffn_norm", "TL.norm3_box"),
            (r"\bTL\.frame_score", "TL.time_attention_weights"),
            (r"\bTL\.frame_value", "TL.time_attention"),
            (r"\bTL\.combine_norm", "TL.norm1"),
            (r"\bTL\.clip_ffn\.(linear\d)", r"TL.\1"),
            (r"\bTL\.clip_ffn_norm", "TL.norm3"),
            (r"\bTL\.", "deformabel_transformer_cross_attention_layers."),
            (r"frame_norm", "decoder_norm2"),
            (r"frame_class_embed", "class_embed_aux"),
            (r"frame_mask_embed", "mask_embed_aux"),
        )
        extra = {"decode_head.conv_seg.weight": torch.zeros(1)}
        if decoder == "TemporalAggregationDecoder":
            foreign = rename(foreign, (r"decoder_norm\.", "decoder_norm1."))
            name = "decode_head.predictor.deformabel_transformer_cross_attention_layers.reference_points.weight"
            extra[name] = torch.zeros(2)
        result = assert_converts({**spine, **foreign, **extra}, {**spine, **native}, extra)
        expected = "the-mask" if decoder == "TemporalAggregationDecoder" else "mask2former"
        assert expected in result.families


UPER_TABLE = """
decode_head.psp_modules.{0-3}.1.{conv.weight,bn.weight,bn.bias,bn.running_mean,bn.running_var}
decode_head.{bottleneck,fpn_bottleneck}.{conv.weight,bn.weight,bn.bias,bn.running_mean,bn.running_var}
decode_head.{lateral_convs,fpn_convs}.{0-2}.{conv.weight,bn.weight,bn.bias,bn.running_mean,bn.running_var}
decode_head.conv_seg.{weight,bias}
auxiliary_head.convs.0.{conv.weight,bn.weight,bn.bias,bn.running_mean,bn.running_var}
auxiliary_head.conv_seg.{weight,bias}
"""


def test_openmmlab_upernet(tmp_path):
    """mmseg's UPerHead and FCNHead after InternImage, in our model of the same parts."""
    overrides = [
        *("MODEL.META_ARCHITECTURE", "ClipSegmentor"),
        *("MODEL.SEM_SEG_HEAD.NAME", "UperNetHead"),
        *("MODEL.SEM_SEG_HEAD.NORM", "BN"),
        *("MODEL.AUX_HEADS", "['res4']"),
    ]
    model = segmentor(*overrides, "MODEL.INTERNIMAGE.VARIANT", "T", *INTERNIMAGE)
    native = noise(model.state_dict())
    foreign = rename(native, (r"^sem_seg_head\.", "decode_head."), (r"^auxiliary_heads\.res4\.", "auxiliary_head."))
    assert {name for name in foreign if not name.startswith("backbone.")} == set(keys(UPER_TABLE))
    assert_converts(foreign, native)
    torch.save({"state_dict": foreign, "meta": {"CLASSES": ["a"], "PALETTE": np.zeros((1, 3))}}, tmp_path / "uper.pth")
    load_weights(model, tmp_path / "uper.pth", strict=True)
    assert all(torch.equal(value, native[n]) for n, value in model.state_dict().items() if n in native)


# --- bad input ---------------------------------------------------------------------------------------------------


def test_incomplete_files(small_state, tmp_path):
    gone = "sem_seg_head.predictor.transformer_ffn_layers.1.linear2.bias"
    save_file({n: v for n, v in small_state.items() if n != gone}, tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=rf"(?s)lacks 1 tensors.*missing.*{re.escape(gone)}"):
        convert_file(tmp_path / "in.safetensors", out)
    assert not out.exists()


def test_half_a_joined_tensor():
    state = {f"segformer.encoder.patch_embeddings.0.{n}": torch.zeros(1) for n in ("proj.weight",)}
    state["segformer.encoder.block.0.0.attention.self.key.weight"] = torch.zeros(2, 2)
    result = convert(state)
    assert "backbone.block1.0.attn.kv.weight (only 1 of 2 parts)" in result.missing
    with pytest.raises(ValueError, match="lacks"):
        check(result)


def test_wrong_family(small_state, tmp_path):
    with pytest.raises(ValueError, match=r"not of family 'segformer'; it looks like Detectron2: ResNet, Mask2Former"):
        convert(small_state, "x.pth", "segformer")
    with pytest.raises(ValueError, match=r"unknown format 'segfromer'.*did you mean segformer\?"):
        convert(small_state, "x.pth", "segfromer")
    with pytest.raises(ValueError, match=r"x.pth: no known family of weights; its names start a.weight.*Known: beit"):
        convert({"a.weight": torch.zeros(1)}, "x.pth")
    assert "mmseg" in FAMILIES


def test_mixed_layouts(swin):
    both = {**original_swin(swin), "model.layers.1.downsample.norm.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match="two tensors of the file become"):
        convert(both)


def test_unknown_names_are_reported(swin):
    result = convert({**original_swin(swin), "extra.gate": torch.zeros(1)})
    assert result.unknown == ["extra.gate"]
    assert re.search(r"unknown, left out +1 +extra.gate", str(result))


def test_config_of_another_model(small_state, tmp_path):
    save_file(small_state, tmp_path / "in.safetensors")
    config = tmp_path / "other.yaml"
    lines = "\n".join(f"{key}: {value}" for key, value in zip(SMALL_HEAD[2::2], SMALL_HEAD[3::2]))
    nested = {}
    for line in lines.splitlines():
        path, value = line.split(": ")
        node = nested
        *parents, leaf = path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = int(value)
    nested["MODEL"]["RESNETS"] = {key.split(".")[-1]: value for key, value in zip(R50[::2], R50[1::2])}
    nested["MODEL"]["RESNETS"]["DEPTH"] = 101
    config.write_text(str(nested))
    out = tmp_path / "out.pth"
    with pytest.raises(ValueError, match=r"(?s)does not fill the model of .*other.yaml.*missing.*backbone.res"):
        convert_file(tmp_path / "in.safetensors", out, config_file=config)
    nested["MODEL"]["RESNETS"]["DEPTH"] = 50
    config.write_text(str(nested))
    text = convert_file(tmp_path / "in.safetensors", out, config_file=config)
    assert "fills backbone, criterion, sem_seg_head" in text
    state = torch.load(out, weights_only=True)["model"]
    assert all(torch.equal(state[name], value) for name, value in small_state.items())


class Odd:
    def __reduce__(self):
        return print, ("executed",)


def test_only_plain_pickles_open(tmp_path, capsys):
    path = tmp_path / "x.pkl"
    for content in (Odd(), {"model": {"a": np.zeros(2)}, "x": Odd()}):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=r"is refused: it is a pickle with .*\(builtins.print\)"):
            convert_file(path, tmp_path / "out.pth")
    # An array of objects would unpickle them.
    path.write_bytes(pickle.dumps({"a": np.array([Odd()], dtype=object)}))
    with pytest.raises(ValueError, match="is refused"):
        convert_file(path, tmp_path / "out.pth")
    torch.save({"a": torch.zeros(1), "x": Odd()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"is refused: it holds Python objects.*--trust"):
        convert_file(tmp_path / "x.pth", tmp_path / "out.pth")
    assert capsys.readouterr().out == ""


def test_targets(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .safetensors or .pth"):
        convert_file(tmp_path / "in.pth", tmp_path / "out.onnx")
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        convert_file(tmp_path / "in.pth", tmp_path / "nowhere" / "out.pth")
    with pytest.raises(FileNotFoundError, match=r"in.pth does not exist"):
        convert_file(tmp_path / "in.pth", tmp_path / "out.pth")
