"""Weights of encoder-only models: released layouts, transformers both ways, DINOv3 changes, position tables."""

import json
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from tolerances import assert_close

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "modeling"))

from encoder_cases import CLASSES, SIDE, random_frames, tiny_config, tiny_segmentor

from the_mask.cli.convert import add_arguments, run
from the_mask.weights import load_weights
from the_mask.weights.converters import check, convert
from the_mask.weights.converters.files import convert_file, write_huggingface
from the_mask.weights.converters.to_huggingface import save_huggingface

VIDEO = ("MODEL.ENCODER.PROPAGATE", True, "MODEL.ENCODER.MASKED_ATTENTION", False)
NAMES = [f"thing {i}" for i in range(CLASSES)]


def own_state(model):
    return {name: value for name, value in model.state_dict().items() if not name.startswith("criterion.")}


def released(model, prefix):
    """A state dict as EoMT ("network.") or VidEoMT ("backbone.") write it."""
    state = {}
    for name, value in own_state(model).items():
        for ours, theirs in (("backbone.model.", f"{prefix}encoder.backbone."), ("sem_seg_head.", prefix)):
            if name.startswith(ours):
                state[theirs + name.removeprefix(ours)] = value.clone()
    return state


@pytest.mark.parametrize("kind", ["dinov2", "dinov2-gated", "dinov3", "vit"])
def test_released_eomt(tmp_path, kind):
    model = tiny_segmentor(kind)
    extra = {"criterion.empty_weight": torch.ones(CLASSES + 1), "network.encoder.pixel_mean": torch.zeros(1, 3, 1, 1)}
    torch.save({**released(model, "network."), **extra}, tmp_path / "pytorch_model.bin")
    report = convert_file(tmp_path / "pytorch_model.bin", tmp_path / "out.safetensors", "eomt")
    assert "released EoMT" in report
    other = tiny_segmentor(kind, seed=3)
    loaded = load_weights(other, tmp_path / "out.safetensors", strict=True)
    assert not loaded.unexpected
    assert all(torch.equal(a, b) for a, b in zip(own_state(model).values(), own_state(other).values(), strict=True))
    # Straight from the release, too.
    assert not load_weights(tiny_segmentor(kind, seed=3), tmp_path / "pytorch_model.bin", strict=True).unexpected


def test_released_videomt(tmp_path):
    model = tiny_segmentor("dinov2", *VIDEO)
    torch.save({"model": released(model, "backbone."), "iteration": 40000}, tmp_path / "model_final.pth")
    other = tiny_segmentor("dinov2", *VIDEO, seed=3)
    report = load_weights(other, tmp_path / "model_final.pth", strict=True)
    assert not report.unexpected
    assert any("released VidEoMT" in note for note in report.notes)
    assert any("MERGE_AT input" in note for note in report.notes)
    assert all(torch.equal(a, b) for a, b in zip(own_state(model).values(), own_state(other).values(), strict=True))


def test_a_missing_tensor_is_named():
    state = released(tiny_segmentor("dinov2", *VIDEO), "backbone.")
    del state["backbone.encoder.backbone.blocks.2.attn.qkv.bias"], state["backbone.query_updater.weight"]
    with pytest.raises(ValueError, match=r"blocks\.2\.attn\.qkv\.bias, sem_seg_head\.query_updater\.weight"):
        check(convert(state))


@pytest.mark.parametrize(
    ("kind", "overrides"), [("dinov2", ()), ("dinov2", VIDEO), ("dinov2-gated", ()), ("vit", ()), ("dinov3", ())]
)
def test_transformers_opens_what_we_write(tmp_path, kind, overrides):
    transformers = pytest.importorskip("transformers")
    model = tiny_segmentor(kind, *overrides)
    assert save_huggingface(model, tmp_path / "hf", NAMES) in ("eomt", "videomt", "eomt_dinov3")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.id2label[2] == "thing 2"
    if kind == "dinov2-gated":
        # Theirs rounds the hidden width of the gate in its own way, which fits ours here.
        assert model.backbone.model.blocks[0].mlp.fc2.in_features == 128
    peer = getattr(transformers, config.architectures[0])
    theirs, info = peer.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    images = random_frames(3)
    with torch.no_grad():
        if model.propagates:
            expected, found = theirs.eval()(images[None]), model.predictions(images, 3)
            found = found["pred_logits"][0], found["pred_masks"][0].transpose(0, 1)
        else:
            expected, found = theirs.eval()(images), model.predictions(images, 1)
            found = found["pred_logits"][:, 0], found["pred_masks"][:, :, 0]
    assert_close(found[0], expected.class_queries_logits, "sample")
    assert_close(found[1], expected.masks_queries_logits, "sample")
    if kind == "vit":
        return  # its table has other rows there
    # And back, from the files that transformers writes itself.
    theirs.save_pretrained(tmp_path / "again")
    other = tiny_segmentor(kind, *overrides, seed=3)
    report = load_weights(other, tmp_path / "again" / "model.safetensors", strict=True)
    assert not report.unexpected
    for name, value in own_state(model).items():
        if not name.endswith("attn_mask_probs"):
            torch.testing.assert_close(other.state_dict()[name], value)


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("dinov3", VIDEO, "no VidEoMT on DINOv3"),
        ("dinov3-gated", (), "one activation for gate and heads"),
        ("dinov2", (*VIDEO, "MODEL.ENCODER.NORM_QUERIES", True), "NORM_QUERIES False"),
    ],
)
def test_models_that_transformers_lacks(tmp_path, kind, overrides, message):
    with pytest.raises(ValueError, match=message):
        save_huggingface(tiny_segmentor(kind, *overrides), tmp_path / "hf")


def test_command_line_writes_a_folder(tmp_path):
    model = tiny_segmentor("dinov2", *VIDEO)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    (tmp_path / "tiny.yaml").write_text(tiny_config("dinov2", *VIDEO).dump())
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [tmp_path / "model.pth", tmp_path / "hf", "--to-huggingface", "--config-file", tmp_path / "tiny.yaml"]
    run(parser.parse_args(list(map(str, words))))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "videomt"
    with pytest.raises(ValueError, match="--config-file"):
        write_huggingface(tmp_path / "model.pth", tmp_path / "hf", None)


def dinov3_files(folder):
    """The encoder before, a file of what training added to it, and the model after."""
    before, after = tiny_segmentor("dinov3"), tiny_segmentor("dinov3")
    original = {name: value.clone() for name, value in before.backbone.model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    state = released(after, "network.")
    changes = {
        name: value - original[name.removeprefix("network.encoder.backbone.")] if ".encoder." in name else value
        for name, value in state.items()
    }
    torch.save(original, folder / "dinov3.pth")
    torch.save(changes, folder / "eomt.bin")
    return after


def test_changes_are_added_to_their_base(tmp_path):
    after = dinov3_files(tmp_path)
    report = convert_file(tmp_path / "eomt.bin", tmp_path / "eomt.pth", base=tmp_path / "dinov3.pth")
    assert "added to the encoder of" in report
    other = tiny_segmentor("dinov3", seed=3)
    load_weights(other, tmp_path / "eomt.pth", strict=True)
    for name, value in own_state(after).items():
        assert_close(other.state_dict()[name], value, "unit")


def test_changes_without_their_base_are_refused(tmp_path):
    dinov3_files(tmp_path)
    with pytest.raises(ValueError, match=r"--base"):
        convert_file(tmp_path / "eomt.bin", tmp_path / "eomt.pth")
    assert not (tmp_path / "eomt.pth").exists()
    with pytest.raises(ValueError, match=r"--base"):
        load_weights(tiny_segmentor("dinov3"), tmp_path / "eomt.bin")
    torch.save(tiny_segmentor("dinov2").backbone.model.state_dict(), tmp_path / "dinov2.pth")
    with pytest.raises(ValueError, match="is not the encoder that"):
        convert_file(tmp_path / "eomt.bin", tmp_path / "eomt.pth", base=tmp_path / "dinov2.pth")
    torch.save(released(tiny_segmentor("dinov3"), "network."), tmp_path / "whole.bin")
    with pytest.raises(ValueError, match="whole weights"):
        convert_file(tmp_path / "whole.bin", tmp_path / "eomt.pth", base=tmp_path / "dinov3.pth")


def test_position_tables_are_resized_as_timm_does(tmp_path):
    model = tiny_segmentor("dinov2")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    larger = tiny_segmentor("dinov2", "MODEL.VIT.IMG_SIZE", 2 * SIDE, seed=3)
    load_weights(larger, tmp_path / "model.pth", strict=True)
    table = model.backbone.model.pos_embed
    expected = timm.layers.resample_abs_pos_embed(table, new_size=[8, 8], old_size=[4, 4], num_prefix_tokens=0)
    torch.testing.assert_close(larger.backbone.model.pos_embed, expected)
    state = model.state_dict()
    state["backbone.model.pos_embed"] = torch.zeros(1, 17, table.shape[-1])[:, :14]
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="14 rows"):
        load_weights(larger, tmp_path / "odd.pth")


def test_encoder_weights_with_another_patch(tmp_path):
    """DINOv2's own file has patches of 14 pixels and a larger table."""
    source = timm.create_model(
        "vit_small_patch14_reg4_dinov2", embed_dim=48, depth=4, num_heads=4, img_size=112, num_classes=0
    )
    torch.save(source.state_dict(), tmp_path / "dinov2.pth")
    model = tiny_segmentor("dinov2", "MODEL.VIT.WEIGHTS", str(tmp_path / "dinov2.pth"))
    assert model.backbone.model.patch_embed.proj.weight.shape[-2:] == (16, 16)
    assert model.backbone.model.pos_embed.shape == (1, 16, 48)


@pytest.mark.parametrize("shape", [(1, 14, 48), (1, 64, 32), (1, 69, 48), (64, 48)])
def test_encoder_weights_whose_table_does_not_fit(tmp_path, shape):
    source = timm.create_model(
        "vit_small_patch14_reg4_dinov2", embed_dim=48, depth=4, num_heads=4, img_size=112, num_classes=0
    )
    torch.save({**source.state_dict(), "pos_embed": torch.zeros(shape)}, tmp_path / "odd.pth")
    expected = rf"odd\.pth: a position table of shape {re.escape(str(list(shape)))}"
    with pytest.raises(ValueError, match=expected) as error:
        tiny_segmentor("dinov2", "MODEL.VIT.WEIGHTS", str(tmp_path / "odd.pth"))
    assert "MODEL.VIT.NAME" in str(error.value)


def test_class_rows_are_copied_by_name(tmp_path):
    from the_mask.weights.class_sets import ClassSets

    model = tiny_segmentor("dinov2")
    torch.save({"model": model.state_dict(), "class_names": NAMES}, tmp_path / "model.pth")
    other = tiny_segmentor("dinov2", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2, seed=3)
    classes = ClassSets(model=("new", "thing 3"), file=None, check=True, by_name=True)
    report = load_weights(other, tmp_path / "model.pth", classes=classes)
    assert "sem_seg_head.class_head.weight" in report.by_name
    found, source = other.sem_seg_head.class_head.weight, model.sem_seg_head.class_head.weight
    assert torch.equal(found[1], source[3])
    assert torch.equal(found[-1], source[-1])
