"""Published segmentors to our names, from their key tables, and bad input."""

import pickle
import re
from collections import OrderedDict
from itertools import product

import numpy as np
import pytest
import torch
from converter_cases import (
    INTERNIMAGE,
    MIT,
    R50,
    SMALL_HEAD,
    assert_converts,
    backbone,
    noise,
    original_swin,
    rename,
    segmentor,
)
from safetensors.torch import load_file, save_file

import the_mask.modeling  # noqa: F401
from the_mask.config import load_config
from the_mask.weights import load_weights
from the_mask.weights.converters import FAMILIES, check, convert
from the_mask.weights.converters.files import convert_file
from the_mask.weights.reading import read_weights


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
    assert "as its release computes: MODEL.MASK_FORMER.MERGE_AT input" in text
    stored = load_file(tmp_path / "native.safetensors")
    assert {n: v.shape for n, v in stored.items()} == {n: v.shape for n, v in small_state.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_names_of_classes_are_kept(small_state, tmp_path, suffix):
    names = [f"class {i}" for i in range(3)]
    torch.save({"model": rename(small_state, *TRAPS[next(iter(TRAPS))]), "class_names": names}, tmp_path / "in.pth")
    convert_file(tmp_path / "in.pth", tmp_path / f"out{suffix}")
    assert read_weights(tmp_path / f"out{suffix}").class_names == tuple(names)


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


@pytest.mark.parametrize("family", ["the-mask", "mask2former", ""])
def test_the_masks_own_one_frame_files(small_state, family):
    """Its first stage is saved in Mask2Former's layout."""
    foreign = rename(small_state, *TRAPS[next(iter(TRAPS))])
    found = check(convert(foreign, "x.pth", family))
    assert {n: v.shape for n, v in found.state.items()} == {n: v.shape for n, v in small_state.items()}
    with pytest.raises(ValueError, match="is not of family 'the-mask'"):
        convert({f"backbone.{n}": v for n, v in small_state.items() if n.startswith("backbone.")}, "x.pth", "the-mask")


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
    written = tmp_path / "as_released.yaml"
    convert_file(tmp_path / "in.safetensors", out, config_file=config, write_config=written)
    cfg = load_config(written)
    assert str(out) == cfg.MODEL.WEIGHTS
    assert cfg.MODEL.MASK_FORMER.MERGE_AT == "input"
    assert load_config(config).MODEL.MASK_FORMER.MERGE_AT == "mask"
    assert cfg.MODEL.RESNETS.DEPTH == 50
    with pytest.raises(ValueError, match=r"as_released.yaml exists"):
        convert_file(tmp_path / "in.safetensors", out, config_file=config, write_config=written)
    with pytest.raises(ValueError, match="on the base of another one"):
        convert_file(tmp_path / "in.safetensors", out, write_config=tmp_path / "new.yaml")


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
    with pytest.raises(ValueError, match=r"is refused: it is a pickle with Python objects.*--trust"):
        convert_file(tmp_path / "x.pth", tmp_path / "out.pth")
    assert capsys.readouterr().out == ""


def test_targets(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .safetensors or .pth"):
        convert_file(tmp_path / "in.pth", tmp_path / "out.onnx")
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        convert_file(tmp_path / "in.pth", tmp_path / "nowhere" / "out.pth")
    with pytest.raises(FileNotFoundError, match=r"in.pth does not exist"):
        convert_file(tmp_path / "in.pth", tmp_path / "out.pth")
