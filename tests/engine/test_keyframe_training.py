"""A propagated model through the normal trainer, resumed and evaluated, from a key segmentor's own checkpoint."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from engine_fakes import CONFIGS, assert_same, debug_cfg, weights

from the_mask.engine import Trainer
from the_mask.weights import load_weights

ROOT = Path(__file__).resolve().parents[2]
CONFIG = CONFIGS / "debug" / "gsvnet_debug.yaml"
SMALL = ["SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.KEYFRAME_DISTANCES", 2]


@pytest.fixture
def key_segmentor(tiny_shapes: Path, tmp_path: Path) -> Path:
    """Checkpoint of an untrained SwiftNet."""
    torch.manual_seed(0)
    model = Trainer.build_model(debug_cfg(tmp_path, config=CONFIGS / "debug" / "swiftnet_debug.yaml"))
    torch.save({"model": model.state_dict()}, tmp_path / "key.pth")
    return tmp_path / "key.pth"


def test_train_resume_and_evaluate(key_segmentor: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    overrides = [*SMALL, "MODEL.WEIGHTS", str(key_segmentor), "TEST.EVAL_PERIOD", 3]
    trainer = Trainer(debug_cfg(tmp_path / "run", *overrides, config=CONFIG))
    trainer.resume_or_load(False)
    key = torch.load(key_segmentor, weights_only=True)["model"]
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert_same({n.removeprefix("segmentor."): v for n, v in before.items() if n.startswith("segmentor.")}, key)
    results = trainer.train()
    after = trainer.model.state_dict()
    for name, value in after.items():
        changed = not torch.equal(value, before[name])
        assert changed != name.startswith("segmentor."), name
    assert set(results) == {"sem_seg", "keyframe"}
    assert {"mIoU", "mIoU_pooled", "mIoU_min", "mIoU_0", "mIoU_1", "mIoU_segmentor"} <= set(results["keyframe"])

    again = Trainer(debug_cfg(tmp_path / "run", *overrides, "SOLVER.MAX_ITER", 4, config=CONFIG))
    again.resume_or_load(True)
    assert again.completed == 3
    assert_same(weights(again), weights(trainer))
    again.train()

    spec = importlib.util.spec_from_file_location("evaluate_keyframes", ROOT / "tools" / "evaluate_keyframes.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    figures = tmp_path / "figures.json"
    classes = str(again.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    words = ["--config-file", str(CONFIG), "--distances", "2", "--json", str(figures), "MODEL.DEVICE", "cpu"]
    words += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", classes, "OUTPUT_DIR", str(tmp_path / "out")]
    assert tool.main([*words, "MODEL.WEIGHTS", str(tmp_path / "run" / "model_final.pth")]) == 0
    assert "GMACs" in capsys.readouterr().out
    row = json.loads(figures.read_text())["moving_shapes_val"]["intervals"][1]
    assert row["interval"] == 2
    assert row["GMACs"] > 0
    assert tool.main([*words, "MODEL.WEIGHTS", str(tmp_path / "none.pth")]) == 1
    assert tool.main([words[0], words[1], "--distances", "0", *words[6:]]) == 1


def test_copying_needs_no_training(key_segmentor: Path, tmp_path: Path) -> None:
    """A copying propagator has no weights: the segmentor's checkpoint fills the model; training it is refused."""
    cfg = debug_cfg(tmp_path / "copy", *SMALL, "MODEL.KEYFRAME.PROPAGATOR", "copy", config=CONFIG)
    model = Trainer.build_model(cfg)
    load_weights(model, key_segmentor, strict=True)
    with pytest.raises(ValueError, match="no trainable parameter"):
        Trainer(cfg)
