"""A class memory through the trainer, a resume, an evaluation in stages, and stored masks."""

from pathlib import Path

import pytest
import torch
from engine_fakes import CONFIGS, assert_same

from the_mask.config import load_config
from the_mask.engine import Trainer
from the_mask.evaluation import evaluate_dataset
from the_mask.weights import read_checkpoint

ROWS = "sem_seg_head.blocks.class_memory.context.memory.rows"


def config(output: Path, *overrides):
    size = ["INPUT.RESIZE.LONG_EDGE", 64, "INPUT.RESIZE.SHORT_EDGE", 48, "INPUT.TEST.LONG_EDGE", 64]
    size += ["INPUT.TEST.SHORT_EDGE", 48, "INPUT.CROP.SIZE", [48, 64], "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", -1]
    size += ["SOLVER.CHECKPOINT_PERIOD", 1, "OUTPUT_DIR", output, "MODEL.DEVICE", "cpu", "TEST.VC_WINDOWS", [2]]
    return load_config(CONFIGS / "debug" / "decoderA_debug.yaml", [str(word) for word in (*size, *overrides)])


def test_training_resumes_bit_for_bit_and_stages_read_stored_masks(tiny_shapes: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path / "run"))
    trainer.resume_or_load(False)
    trainer.train()
    final = trainer.model.state_dict()
    middle = read_checkpoint(tmp_path / "run" / "model_0000000.pth")["model"]
    assert middle[ROWS].abs().sum() > 0
    assert not torch.equal(middle[ROWS], final[ROWS])

    again = Trainer(config(tmp_path / "again"))
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "model_0000000.pth").write_bytes((tmp_path / "run" / "model_0000000.pth").read_bytes())
    (tmp_path / "again" / "last_checkpoint").write_text("model_0000000.pth")
    again.resume_or_load(True)
    assert again.completed == 1
    again.train()
    assert_same(again.model.state_dict(), final)

    masks, one = tmp_path / "masks", tmp_path / "one"
    name = "moving_shapes_val"
    plain = evaluate_dataset(config(tmp_path, "TEST.SAVE_PREDICTIONS", masks), trainer.model, name)
    stages = ["TEST.STAGES.COUNT", 1, "TEST.SAVE_PREDICTIONS", one]
    kept = evaluate_dataset(config(tmp_path, *stages), trainer.model, name)
    stored = evaluate_dataset(config(tmp_path, "TEST.STAGES.COUNT", 1, "TEST.STAGES.MASKS", masks), trainer.model, name)
    assert kept["sem_seg"] == pytest.approx(stored["sem_seg"], abs=0, rel=0, nan_ok=True)
    assert plain["sem_seg"].keys() == kept["sem_seg"].keys()
    # Masks of every frame are there, and can be read into training clips.
    frames = sorted(path.relative_to(masks) for path in masks.rglob("*.png"))
    assert len(frames) == 12
    assert frames == sorted(path.relative_to(one) for path in one.rglob("*.png"))
