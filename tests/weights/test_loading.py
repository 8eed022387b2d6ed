"""Loading weights: formats, trust, names, and the report on what does not fit."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.modeling import build_backbone, build_model
from engine_fakes import CONFIGS, DEBUG
from safetensors.torch import save_file
from tolerances import assert_close
from torch import nn

import the_mask.modeling  # noqa: F401
from the_mask.config import load_config
from the_mask.engine.ema import ExponentialMovingAverage
from the_mask.weights import LoadReport, load_weights
from the_mask.weights.loading import compare


class Segmentor(nn.Module):
    def __init__(self, classes: int = 3, width: int = 4) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))
        self.class_embed = nn.Linear(width, classes + 1)
        self.criterion = nn.Module()
        self.criterion.register_buffer("empty_weight", torch.ones(classes + 1))


def filled(model: nn.Module, value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in model.state_dict().items()}


def save_torch(state: dict, path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("wrap", ["bare", "model", "state_dict", "nested", "ddp", "safetensors", "numpy pickle"])
def test_formats(tmp_path: Path, wrap: str) -> None:
    model = Segmentor()
    state = filled(model, 2)
    if wrap == "safetensors":
        path = tmp_path / "w.safetensors"
        save_file(state, path)
    elif wrap == "numpy pickle":
        path = tmp_path / "w.pkl"
        content = {"model": {k: v.numpy() for k, v in state.items()}, "__author__": "x", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(content))
    else:
        content = {
            "bare": state,
            "model": {"model": state, "iteration": 3},
            "state_dict": {"state_dict": state, "meta": {"epoch": 1}},
            "nested": {"model": {"state_dict": state}},
            "ddp": {f"module.{name}": value for name, value in state.items()},
        }[wrap]
        path = save_torch(content, tmp_path / "w.pth")
    report = load_weights(model, path, trust_pickle=wrap == "numpy pickle", strict=True)
    assert len(report.loaded) == len(state)
    assert report.match == 1
    assert not report.missing
    assert all((value == 2).all() for value in model.state_dict().values())


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_pickles_need_trust(tmp_path: Path, suffix: str) -> None:
    model, path, trace = Segmentor(), tmp_path / f"w{suffix}", tmp_path / "executed"
    content = {"model": filled(model, 2), "x": Payload(str(trace))}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"is refused.*--trust-pickle"):
        load_weights(model, path)
    assert not trace.exists()
    load_weights(model, path, trust_pickle=True)
    assert trace.exists()


def test_numpy_scalars_next_to_tensors_need_trust(tmp_path: Path) -> None:
    """Many published checkpoints hold such a value; upstream gives no way to open them."""
    model = Segmentor()
    path = save_torch({"model": filled(model, 2), "best": np.float64(3)}, tmp_path / "w.pth")
    load_weights(model, path, trust_pickle=True)
    assert model.class_embed.bias[0] == 2


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_files(tmp_path: Path, suffix: str, damage: str) -> None:
    model, path = Segmentor(), tmp_path / f"w{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps({"model": {"x": np.zeros(500)}}))
    elif suffix == ".pth":
        torch.save(filled(model, 1), path)
    else:
        save_file(filled(model, 1), path)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "garbage": b"\x93" * 999, "empty": b""}[damage])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"w{suffix} is corrupt"):
        load_weights(model, path, trust_pickle=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = save_torch(filled(Segmentor(), 1), tmp_path / "w.pth")
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(3).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        load_weights(Segmentor(), path)


def test_not_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"weights file .*none.pth does not exist"):
        load_weights(Segmentor(), tmp_path / "none.pth")
    with pytest.raises(ValueError, match="holds a list"):
        load_weights(Segmentor(), save_torch([1], tmp_path / "list.pth"))
    with pytest.raises(ValueError, match=r"holds no tensors; its keys are \['epoch'\]"):
        load_weights(Segmentor(), save_torch({"epoch": 1}, tmp_path / "epoch.pth"))


def test_another_architecture(tmp_path: Path) -> None:
    model = Segmentor()
    path = save_torch(nn.TransformerEncoderLayer(8, 2, 8).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"another architecture: only 0%") as info:
        load_weights(model, path)
    for part in ("missing in the file", "unknown to the model", "self_attn.in_proj_weight", "class_embed.*"):
        assert part in str(info.value)


def test_other_widths_are_another_architecture(tmp_path: Path) -> None:
    path = save_torch(filled(Segmentor(width=9), 1), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"(?s)another architecture.*file \[9, 3, 1, 1\], model \[4, 3, 1, 1\]"):
        load_weights(Segmentor(), path)


def test_other_classes_drop_class_layers_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Segmentor(classes=5)
    before = model.class_embed.weight.clone()
    path = save_torch(filled(Segmentor(classes=3), 7), tmp_path / "w.pth")
    with caplog.at_level("INFO", logger="the_mask"):
        report = load_weights(model, path)
    assert [name for name, _, _ in report.dropped] == [
        "class_embed.weight",
        "class_embed.bias",
        "criterion.empty_weight",
    ]
    assert not report.mismatched
    assert torch.equal(model.class_embed.weight, before)
    assert torch.equal(model.criterion.empty_weight, torch.ones(6))
    assert (model.backbone[0].weight == 7).all()
    assert "class layers, started anew" in caplog.text
    assert "file [4, 4], model [6, 4]" in caplog.text
    with pytest.raises(ValueError, match="does not fill the whole model"):
        load_weights(Segmentor(classes=5), path, strict=True)


def test_strict_ignores_constants(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="the_mask")
    model = Segmentor()
    state = filled(model, 1)
    del state["criterion.empty_weight"], state["backbone.1.num_batches_tracked"]
    report = load_weights(model, save_torch(state, tmp_path / "w.pth"), strict=True)
    assert report.missing == ["backbone.1.num_batches_tracked", "criterion.empty_weight"]
    assert report.lacking == []
    assert "set by the config" in str(report)
    assert [record.levelname for record in caplog.records] == ["INFO"], "nothing to warn of"
    del state["backbone.1.running_mean"]
    with pytest.raises(ValueError, match="does not fill the whole model"):
        load_weights(model, save_torch(state, tmp_path / "w.pth"), strict=True)


def test_bare_backbone(tmp_path: Path) -> None:
    model = Segmentor()
    bare = {name.removeprefix("backbone."): value for name, value in filled(model, 4).items() if "backbone" in name}
    bare["head.weight"] = torch.zeros(10, 4)
    report = load_weights(model, save_torch(bare, tmp_path / "w.pth"))
    assert report.unexpected == ["backbone.head.weight"]
    assert any("'backbone.' put before each" in note for note in report.notes)
    assert (model.backbone[0].weight == 4).all()


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_resnet(tmp_path: Path, depth: int) -> None:
    """Same features from torchvision's network and from Detectron2's with its weights."""
    overrides = ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.NORM", "FrozenBN"]
    overrides += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64 if depth == 18 else 256]
    ours = nn.ModuleDict({"backbone": build_backbone(load_config(None, overrides))}).eval()
    theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    torch.manual_seed(0)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.2, 1)
    report = load_weights(ours, save_torch(theirs.state_dict(), tmp_path / "r.pth"))
    assert not report.missing
    assert not report.unexpected
    assert [name for name, reason in report.ignored.items() if reason == "classifier"] == ["fc.weight", "fc.bias"]
    assert "ignored: classifier" in str(report)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        expected = {}
        for number in range(1, 5):
            x = expected[f"res{number + 1}"] = getattr(theirs, f"layer{number}")(x)
        found = ours["backbone"](image)
    for name, value in expected.items():
        assert_close(found[name], value, "network", what=name)


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    model = Segmentor()
    ema = ExponentialMovingAverage(model, 0.5)
    ema.average = filled(model, 8)
    path = save_torch({"model": filled(model, 3), "ema": ema.state_dict()}, tmp_path / "w.pth")
    report = load_weights(model, path)
    assert report.notes == ["weights: the exponential moving average"]
    assert (model.class_embed.weight == 8).all()
    load_weights(model, path, use_ema=False)
    assert (model.class_embed.weight == 3).all()


def test_stage_2_from_stage_1(tmp_path: Path) -> None:
    overrides = ["MODEL.DEVICE", "cpu"]
    stage1 = build_model(load_config(CONFIGS / "debug" / "the_mask_debug_1f.yaml", overrides))
    stage2 = build_model(load_config(CONFIGS / "debug" / "the_mask_debug_video.yaml", overrides))
    path = save_torch({"model": stage1.state_dict()}, tmp_path / "stage1.pth")
    report = load_weights(stage2, path, stage1=True)
    assert not report.unexpected
    assert not report.mismatched
    assert all(".temporal_layer." in name for name in report.missing)
    both, one = stage2.state_dict(), stage1.state_dict()
    head = "sem_seg_head.predictor."
    assert torch.equal(both[f"{head}frame_class_embed.weight"], one[f"{head}class_embed.weight"])
    assert torch.equal(both[f"{head}class_embed.weight"], one[f"{head}class_embed.weight"])

    own = save_torch({"model": stage2.state_dict()}, tmp_path / "stage2.pth")
    with pytest.raises(ValueError, match="needs a one-frame checkpoint"):
        load_weights(stage2, own, stage1=True)
    foreign = save_torch(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match="needs a one-frame"):
        load_weights(stage2, foreign, stage1=True)


def test_deeper_backbone_is_reported(tmp_path: Path) -> None:
    """R34 weights in an R18 model: most fits, and what is too much is named."""
    small = build_model(load_config(DEBUG, ["MODEL.DEVICE", "cpu"]))
    large = build_model(load_config(DEBUG, ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 34]))
    report = load_weights(small, save_torch(large.state_dict(), tmp_path / "w.pth"))
    assert not report.missing
    assert all(name.startswith("backbone.res") for name in report.unexpected)
    assert 0.5 < report.match < 1


def test_report_folds_long_lists() -> None:
    report = compare({}, {f"layer{i}.{kind}": torch.zeros(1) for i in range(9) for kind in ("weight", "bias")})
    text = str(report)
    assert "layer0.*, layer1.*" in text
    assert "(3 more)" in text
    assert report.match == 0
    assert isinstance(report, LoadReport)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "torch before 1.6", "pickle"])
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".bin", ".safetensors", ".ckpt"])
def test_content_decides_not_the_suffix(tmp_path: Path, kind: str, suffix: str) -> None:
    model = Segmentor()
    state, path = filled(model, 2), tmp_path / f"w{suffix}"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"model": {name: value.numpy() for name, value in state.items()}}))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch")
    assert load_weights(model, path, strict=True).match == 1


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(tmp_path: Path, prefix: str) -> None:
    model = Segmentor()
    state = {f"{prefix}{name}": value for name, value in filled(model, 2).items()}
    assert load_weights(model, save_torch(state, tmp_path / "w.pth"), strict=True).match == 1


def test_compiled_parts(tmp_path: Path) -> None:
    model = Segmentor()
    state = {name.replace("backbone.", "backbone._orig_mod."): value for name, value in filled(model, 2).items()}
    assert load_weights(model, save_torch(state, tmp_path / "w.pth"), strict=True).match == 1


def test_batch_norm_without_its_counter(tmp_path: Path) -> None:
    """As torch before 0.4.1 wrote it, and as torch itself still reads it."""
    model = Segmentor()
    state = {name: value for name, value in filled(model, 2).items() if not name.endswith("num_batches_tracked")}
    assert len(state) < len(model.state_dict())
    assert load_weights(model, save_torch(state, tmp_path / "w.pth"), strict=True).match == 1


def test_a_folder_and_weights_in_several_files(tmp_path: Path) -> None:
    """Written as Hugging Face's ``save_pretrained`` lays them out."""
    model = Segmentor()
    state = filled(model, 2)
    names = list(state)
    halves = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, part in halves.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    places = {name: file for file, part in halves.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    for path in (index, tmp_path):
        report = load_weights(model, path, strict=True)
        assert report.match == 1
        assert f"{len(names)} tensors of the index model.safetensors.index.json" in str(report)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index.json names .*00002-of-00002.* the weights are incomplete"):
        load_weights(model, index)
    for places, said in (
        ({names[0]: "../x.safetensors"}, "leads out of its folder"),
        ({"other": "model-00001-of-00002.safetensors"}, "1 tensors that are not in its files, e.g. other"),
        ({}, "no index of weights"),
        ([1], "no index of weights"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(ValueError, match=said):
            load_weights(model, index)
    save_file(state, tmp_path / "model.safetensors")
    assert load_weights(model, tmp_path, strict=True).match == 1


def test_addresses_and_folders_without_weights(tmp_path: Path) -> None:
    for address in ("https://example.org/w.pth", "hf://owner", "s3://bucket/w.pth"):
        with pytest.raises(ValueError, match="addresses are not read; download the file"):
            load_weights(Segmentor(), address)
    with pytest.raises(FileNotFoundError, match="it holds no weights file"):
        load_weights(Segmentor(), tmp_path)
    save_torch(filled(Segmentor(), 2), tmp_path / "model_final.pth")
    with pytest.raises(FileNotFoundError, match=r"name one of its files: model_final.pth"):
        load_weights(Segmentor(), tmp_path)


@pytest.mark.parametrize(("config", "table"), [("mask2former_debug", "query_feat"), ("eomt_debug", "q")])
def test_more_queries_begin_as_noisy_copies(tmp_path: Path, config: str, table: str) -> None:
    def build(queries: int) -> nn.Module:
        keys = ["MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", str(queries), "MODEL.DEVICE", "cpu"]
        return build_model(load_config(CONFIGS / f"debug/{config}.yaml", keys))

    small, large = build(4), build(10)
    path = save_torch(small.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not fill the whole model"):
        load_weights(large, path, strict=True)
    report = load_weights(large, path)
    assert report.fits
    assert report.notes == ["6 of 10 queries are noisy copies of the file's 4"]
    (name,) = (name for name in large.state_dict() if name.endswith(f".{table}.weight"))
    old, new = small.state_dict()[name], large.state_dict()[name]
    assert torch.equal(new[:4], old)
    noise = new[4:] - torch.cat([old, old[:2]])
    assert 0.2 * old.std() < noise.std() < 0.4 * old.std()
    # The other way round there is no choice of queries to leave out.
    assert not load_weights(build(3), path).fits
