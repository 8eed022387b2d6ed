"""tools/train_two_stage.py: both stages, both evaluations, and a stage 2 that really starts from stage 1."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from the_mask.data import register_all
from the_mask.data.synthetic import SceneSize, make_moving_shapes

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = ROOT / "configs" / "debug"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("train_two_stage_tool", ROOT / "tools" / "train_two_stage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path, monkeypatch):
    make_moving_shapes(tmp_path / "data" / "moving_shapes", 0, 2, 1, SceneSize(6, 64, 64))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    register_all()
    yield
    monkeypatch.undo()
    register_all()


def test_two_stages(tool, data, tmp_path, capsys):
    output = tmp_path / "run"
    stages = [
        "--stage1",
        str(CONFIGS / "the_mask_debug_1f.yaml"),
        "--stage2",
        str(CONFIGS / "the_mask_debug_video.yaml"),
    ]
    size = ["INPUT.TEST.LONG_EDGE", "64", "INPUT.TEST.SHORT_EDGE", "64", "SOLVER.MAX_ITER", "2", "MODEL.DEVICE", "cpu"]
    assert tool.main([*stages, "--output", str(output), "--branches", *size]) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert list(summary) == ["one_frame", "temporal", "clip branch", "frame branch"]
    for figures in summary.values():
        assert 0 <= figures["mIoU"] <= 100
    assert "frame branch" in capsys.readouterr().out
    first, second = (
        torch.load(output / stage / "model_final.pth", weights_only=True)["model"]
        for stage in ("one_frame", "temporal")
    )
    # Stage 2 trains the predictor only: the rest is stage 1's, and the heads moved by two small steps only.
    frozen = [name for name in first if name.startswith(("backbone.", "sem_seg_head.pixel_decoder."))]
    assert frozen
    assert all(torch.equal(first[name], second[name]) for name in frozen)
    head = "sem_seg_head.predictor.class_embed.weight"
    assert 0 < (first[head] - second[head]).abs().max() < 1e-2


def test_missing_stage1_is_a_plain_error(tool, tmp_path, capsys):
    arguments = ["--stage1", str(tmp_path / "none.yaml"), "--stage2", "x.yaml", "--output", str(tmp_path)]
    assert tool.main(arguments) == 1
    assert "none.yaml" in capsys.readouterr().err
