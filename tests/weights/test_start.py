"""Training that starts from a trained model, on an imported data set with other classes."""

import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch
from importer_fixtures import COLORS, NAMES, color_mask, truth
from PIL import Image

from the_mask import cli, models
from the_mask.config import load_config
from the_mask.data.importers import import_dataset
from the_mask.engine import RunOptions, Trainer
from the_mask.modeling.build import build_segmentor
from the_mask.weights import load_weights, read_checkpoint
from the_mask.weights.packing import pack_model
from the_mask.weights.reading import locate_weights, read_weights
from the_mask.weights.start import start_config

SMALL = [
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2"),
    *("INPUT.CROP.SIZE", "[32, 32]", "INPUT.RESIZE.LONG_EDGE", "48", "INPUT.RESIZE.SHORT_EDGE", "32"),
    *("INPUT.TEST.LONG_EDGE", "48", "INPUT.TEST.SHORT_EDGE", "32", "TEST.EVAL_PERIOD", "2", "SEED", "1"),
]
STREET = [
    *("DATASETS.TRAIN", "('camvid_train',)", "DATASETS.TEST", "('camvid_val',)"),
    *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "11", "SOLVER.BASE_LR", "0.0123", "SOLVER.TRACKERS", "('wandb',)"),
]


def packed(name, config, *overrides):
    """A model of random weights on the shelf; its tensors."""
    torch.manual_seed(0)
    cfg = load_config(f"configs/debug/{config}.yaml", [*SMALL, *STREET, *overrides])
    cfg.MODEL.WEIGHTS = str(models.FOLDER / f"{name}.pth")
    torch.save({**build_segmentor(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    pack_model(cfg, name, folder=models.FOLDER)
    return read_weights(models.FOLDER / f"{name}.safetensors").state


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    (tmp_path / "shelf").mkdir()
    monkeypatch.setattr(models, "FOLDER", tmp_path / "shelf")


@pytest.fixture
def mine(tmp_path):
    """An export of CVAT, imported: two videos, classes road and car; CamVid has both, in another order."""
    rows = ["background:0,0,0::", *(f"{name}:{r},{g},{b}::" for name, (r, g, b) in zip(NAMES, COLORS, strict=True))]
    with zipfile.ZipFile(tmp_path / "task.zip", "w") as file:
        file.writestr("labelmap.txt", "\n".join(["# label:color_rgb:parts:actions", *rows]) + "\n")
        for video in ("a", "b"):
            for number in range(2):
                for folder, pixels in (
                    ("JPEGImages", np.random.default_rng(number).integers(0, 255, (12, 20, 3), dtype=np.uint8)),
                    ("SegmentationClass", color_mask(truth(number))),
                ):
                    stream = BytesIO()
                    Image.fromarray(pixels).save(stream, "PNG")
                    file.writestr(f"{folder}/{video}/{number}.png", stream.getvalue())
    report = import_dataset(tmp_path / "task.zip", "cvat-masks", tmp_path / "mine")
    assert report.splits == {"train": (["a"], 2), "val": (["b"], 2)}
    return tmp_path / "mine"


def test_a_shipped_model_learns_other_classes(shelf, mine, tmp_path):
    """The command as a user types it. Tensors are taken but for class layers, whose rows follow the names."""
    theirs = packed("street-one", "mask2former_debug")
    output = tmp_path / "out"
    command = ["train", "--model", "street-one", "--data", str(mine), *SMALL, "OUTPUT_DIR", str(output)]
    start = Trainer(RunOptions(model="street-one", data=str(mine), overrides=command[5:]).load())
    fresh = {name: value.clone() for name, value in start.model.state_dict().items()}
    report = start.load_weights(start.cfg.MODEL.WEIGHTS)
    ours = start.model.state_dict()
    row = {"road": 3, "car": 8}
    for name, value in ours.items():
        if name in report.loaded:
            assert torch.equal(value, theirs[name].to(value)), name
    assert {name.rpartition(".")[0] for name in report.by_name} == {"sem_seg_head.predictor.class_embed"}
    for name in report.by_name:
        for index, label in enumerate(NAMES):
            assert torch.equal(ours[name][index], theirs[name][row[label]].to(ours[name]))
        assert torch.equal(ours[name][-1], theirs[name][-1].to(ours[name])), "no object"
        assert not torch.equal(ours[name], fresh[name])
    assert not report.untrained()

    assert cli.main(command) == 0
    log = (output / "log.txt").read_text()
    line = next(line for line in log.splitlines() if "tensors loaded" in line)
    assert "street-one.safetensors: " in line
    assert "class layers, rows copied by name: sem_seg_head.predictor.class_embed.*" in line
    assert "2 of 2 copied by name" in line
    assert "missing in the file" not in log, "no table where everything fits"
    trained = read_checkpoint(output / "model_final.pth")
    assert trained["class_names"] == NAMES
    moved = [name for name in report.loaded if not torch.equal(trained["model"][name], ours[name])]
    assert len(moved) > len(report.loaded) / 2
    cfg = load_config(output / "config.yaml")
    assert cfg.DATASETS.TRAIN == ("mine_train",)
    assert cfg.DATASETS.TEST == ("mine_val",)
    assert cfg.SOLVER.BASE_LR == 0.0123, "the recipe of the model"
    assert not cfg.SOLVER.TRACKERS, "not where it was logged"
    assert "IoU-road" in (output / "metrics.json").read_text()
    # The result is a config and weights like any other.
    assert (
        cli.main(["evaluate", "--config", str(output / "config.yaml"), "--weights", str(output / "model_final.pth")])
        == 0
    )


def test_values_of_the_models_classes_are_reset(shelf, mine):
    packed("street-one", "swiftnet_debug", "MODEL.CLIP_SEGMENTOR.CLASS_WEIGHTS", str([1.0] * 10 + [3.0]))
    cfg = start_config(model="street-one", data=mine)
    assert not cfg.MODEL.CLIP_SEGMENTOR.CLASS_WEIGHTS
    assert cfg.MODEL.INIT_CLASSES_BY_NAME
    own = start_config(model="street-one", data=mine, overrides=["MODEL.CLIP_SEGMENTOR.CLASS_WEIGHTS", "(1, 2.0)"])
    assert list(own.MODEL.CLIP_SEGMENTOR.CLASS_WEIGHTS) == [1, 2.0]
    as_packed = start_config(model="street-one")
    assert len(as_packed.MODEL.CLIP_SEGMENTOR.CLASS_WEIGHTS) == as_packed.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 11
    # Of a config file, the classes of its data sets are compared.
    street = start_config("camvid/street_live_frame", data=mine)
    assert not street.MODEL.CLIP_SEGMENTOR.CLASS_WEIGHTS
    assert street.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 2
    assert not street.MODEL.INIT_CLASSES_BY_NAME
    build_segmentor(street)


def test_the_segmentor_of_a_keyframe_model_is_a_start(shelf, mine, tmp_path):
    """Its own training would leave new class layers frozen, which is refused with the way to go."""
    theirs = packed("live-one", "gsvnet_debug")
    words = [*SMALL, "OUTPUT_DIR", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"Train the frozen part .*META_ARCHITECTURE ClipSegmentor"):
        Trainer(RunOptions(model="live-one", data=str(mine), overrides=words).load()).resume_or_load(False)
    cfg = start_config("configs/debug/swiftnet_debug.yaml", [*words, "MODEL.WEIGHTS", "live-one"], data=mine)
    trainer = Trainer(cfg)
    report = trainer.load_weights(cfg.MODEL.WEIGHTS)
    assert not report.lacking
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], theirs[f"segmentor.{name}"].to(state[name])) for name in report.loaded)


def test_weights_by_name(shelf, tmp_path, monkeypatch):
    packed("street-one", "swiftnet_debug")
    assert locate_weights("street-one") == models.FOLDER / "street-one.safetensors"
    cfg = load_config("configs/debug/swiftnet_debug.yaml", [*SMALL, *STREET, "MODEL.WEIGHTS", "street-one"])
    assert load_weights(build_segmentor(cfg), cfg.MODEL.WEIGHTS, strict=True).summary().count("\n") == 0
    with pytest.raises(FileNotFoundError, match="street-won does not exist; did you mean the model street-one"):
        locate_weights("street-won")
    # A file of the user is never hidden by a model of this name.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "street-one").write_bytes(b"own")
    assert locate_weights("street-one").read_bytes() == b"own"
    (tmp_path / "street-one").unlink()
    content = bytearray((models.FOLDER / "street-one.safetensors").read_bytes())
    content[-1] ^= 1
    (models.FOLDER / "street-one.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        locate_weights("street-one")


def test_bad_starts(shelf, mine, tmp_path):
    with pytest.raises(ValueError, match="one of them"):
        start_config()
    with pytest.raises(ValueError, match="no model 'street-two'"):
        start_config(model="street-two", data=mine)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        start_config("camvid/street_mask", data=tmp_path / "nowhere")
    (tmp_path / "plain").mkdir()
    with pytest.raises(FileNotFoundError, match=r"plain holds no dataset\.py, so the-mask import has not written it"):
        start_config("camvid/street_mask", data=tmp_path / "plain")
    (tmp_path / "plain/dataset.py").write_text("")
    with pytest.raises(ValueError, match="registers no training set"):
        start_config("camvid/street_mask", data=tmp_path / "plain")
