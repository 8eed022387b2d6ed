"""Models that come with the library: packed, found by name, checked, and ready for frames."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import the_mask
import the_mask.modeling
from the_mask import models
from the_mask.config import load_config
from the_mask.data.files import file_digest
from the_mask.inference import StreamingSegmentor
from the_mask.modeling.build import build_segmentor
from the_mask.models import model_config, model_names, read_card
from the_mask.weights.packing import pack_model
from the_mask.weights.trained import trained

CONFIG = "configs/debug/swiftnet_debug.yaml"


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder of models with one of random weights, ``small-one``; its checkpoint and config."""
    torch.manual_seed(0)
    cfg = load_config(CONFIG, ["MODEL.DEVICE", "cpu", "INPUT.TEST.SHORT_EDGE", "64", "INPUT.TEST.LONG_EDGE", "96"])
    model = build_segmentor(cfg)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1e5)  # more than float16 holds
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save(model.state_dict(), cfg.MODEL.WEIGHTS)
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setattr(models, "FOLDER", folder)
    pack_model(cfg, "small-one", folder=folder)
    return folder, cfg


def test_the_packed_model_computes_as_the_checkpoint(shelf):
    folder, cfg = shelf
    segmentor = the_mask.load("small-one")
    assert model_names() == ["small-one"]
    packed, original = segmentor.model.state_dict(), trained(cfg).state_dict()
    for name, value in original.items():
        bound = value.abs() * 2**-11 + 2**-24 if value.ndim > 1 else 0
        assert bool(((packed[name] - value).abs() <= bound).all()), name
        assert packed[name].dtype == value.dtype
    assert (folder / "small-one.safetensors").stat().st_size < 0.6 * (folder.parent / "model.pth").stat().st_size
    frame = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    labels, state = segmentor.step(frame, segmentor.init_state())
    # The config was packed with it: the same network size, and equal labels but for rounding.
    own = StreamingSegmentor(cfg)
    expected, _ = own.step(frame, own.init_state())
    assert labels.shape == (64, 96)
    assert (labels == expected).float().mean() > 0.99
    assert state["size"] == [64, 96]


def test_the_config_alone_is_enough(shelf):
    _, cfg = shelf
    packed = model_config("small-one", ["MODEL.DEVICE", "cpu"])
    packed.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS
    assert packed.MODEL == cfg.MODEL
    assert packed.INPUT == cfg.INPUT
    assert packed.TEST == cfg.TEST


def test_packing_again_keeps_what_people_wrote(shelf):
    folder, cfg = shelf
    card = folder / "small-one.md"
    old = read_card("small-one").facts
    card.write_text("---\nsummary: tiny\nsha256: old\n---\n\nFails at night.\n")
    pack_model(cfg, "small-one", folder=folder)
    again = read_card("small-one")
    assert again.facts == {"summary": "tiny", **old}, "packed again, the file is the same"
    assert old["sha256"] == file_digest(folder / "small-one.safetensors")
    assert again.text == "Fails at night.\n"
    content = load_file(folder / "small-one.safetensors")
    assert {value.dtype for value in content.values() if value.ndim > 1} == {torch.float16}


def test_bad_names_and_files(shelf):
    folder, cfg = shelf
    with pytest.raises(ValueError, match=r"no model 'smal-one'.*did you mean small-one\? known: small-one"):
        the_mask.load("smal-one")
    with pytest.raises(ValueError, match="expected one of auto"):
        the_mask.load("small-one", backend="magic")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        the_mask.load("nowhere.yaml")
    with pytest.raises(ValueError, match="lower case"):
        pack_model(cfg, "Small One", folder=folder)
    with pytest.raises(FileNotFoundError, match="folder does not exist"):
        pack_model(cfg, "other", folder=folder / "no")
    weights = folder / "small-one.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"small-one\.safetensors is damaged: its SHA-256 is .* install"):
        the_mask.load("small-one")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="installation is incomplete"):
        the_mask.load("small-one")
    (folder / "small-one.md").write_text("no facts\n")
    with pytest.raises(ValueError, match="card of small-one is damaged"):
        the_mask.load("small-one")


@pytest.mark.parametrize("name", model_names())
def test_models_that_come_with_the_library(name):
    """The files are whole, their cards say what they must, and a frame goes through."""
    card = read_card(name)
    needed = ("summary", "data", "licence", "command", "commit", "seed", "metrics", "speed", "sha256", "classes")
    assert [fact for fact in needed if not card.facts.get(fact) and card.facts.get(fact) != 0] == []
    assert "fail" in card.text.lower()
    segmentor = the_mask.load(name, "eager", ["MODEL.DEVICE", "cpu"])
    assert sum(parameter.numel() for parameter in segmentor.model.parameters()) == card.facts["parameters"]
    frame = np.full((96, 128, 3), 127, np.uint8)
    labels, state = segmentor.step(frame, segmentor.init_state())
    labels, state = segmentor.step(frame, state)
    assert labels.shape == (96, 128)
    assert int(labels.max()) < len(card.facts["classes"])


def test_all_models_fit_into_the_wheel():
    assert sum(path.stat().st_size for path in models.FOLDER.glob("*.safetensors")) <= 16 * 2**20
