"""Golden numbers of the debug runs: both stages on six procedural videos, every logged loss and the final figures.

A refactor must not move them. A change of numerics does: run with ``THE_MASK_UPDATE_GOLDEN=1``, commit the new
numbers, and show the convergence in docs/experiments.md. They are the same on an installed Detectron2.
"""

import json
import os
from pathlib import Path

import pytest

from the_mask.data import register_all
from the_mask.data.synthetic import SceneSize, make_moving_shapes
from the_mask.engine import train_two_stage

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDEN = Path(__file__).parent / "golden"
RUNS = {
    "debug.json": ("the_mask_debug_1f", "the_mask_debug_video"),
    "debug_encoder.json": ("eomt_debug", "videomt_debug"),
}
FIGURES = ("mIoU", "fwIoU", "pACC")
# Other processors, kernels and library versions round (and decode JPEG) a little differently. That can swap two
# near-equal assignments, which moves one term by a few percent and the total hardly.
TOTAL_TOLERANCE, TERM_TOLERANCE, FIGURE_TOLERANCE = 5e-3, 5e-2, 3.0


@pytest.fixture
def data(tmp_path, monkeypatch):
    make_moving_shapes(tmp_path / "moving_shapes", 0, 4, 2, SceneSize(20, 64, 96))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_all()
    yield
    monkeypatch.undo()
    register_all()


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: round(v, 5) for k, v in line.items() if "loss" in k} for line in lines if "total_loss" in line]


@pytest.mark.parametrize("name", RUNS)
def test_debug_run_has_golden_numbers(data, tmp_path, name):
    configs = [ROOT / "configs" / "debug" / f"{stage}.yaml" for stage in RUNS[name]]
    device = os.environ.get("THE_MASK_TEST_DEVICE", "cpu")
    results, _ = train_two_stage(configs, tmp_path / "run", ["MODEL.DEVICE", device])
    found = {
        stage: {
            "losses": losses_of(tmp_path / "run" / stage),
            "figures": {name: round(float(figures[name]), 3) for name in FIGURES},
        }
        for stage, figures in results.items()
    }
    if os.environ.get("THE_MASK_UPDATE_GOLDEN") == "1":
        (GOLDEN / name).write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads((GOLDEN / name).read_text())
    assert found.keys() == golden.keys()
    for stage, numbers in golden.items():
        assert len(found[stage]["losses"]) == len(numbers["losses"]) >= 5
        for line, expected in zip(found[stage]["losses"], numbers["losses"], strict=True):
            assert line.keys() == expected.keys()
            assert line["total_loss"] == pytest.approx(expected["total_loss"], rel=TOTAL_TOLERANCE)
            assert line == pytest.approx(expected, rel=TERM_TOLERANCE)
        for name, expected in numbers["figures"].items():
            assert found[stage]["figures"][name] == pytest.approx(expected, abs=FIGURE_TOLERANCE)
