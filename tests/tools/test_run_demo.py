"""The demo from data to pictures, with the debug models; and what a second run does."""

import importlib.util
import json
from pathlib import Path

import pytest

from the_mask.data import register_all
from the_mask.data.io import read_image
from the_mask.inference.rendering.video_writer import open_source

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("run_demo_tool", ROOT / "tools" / "run_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    configs = ROOT / "configs" / "debug"
    yield [
        *("--one-frame-config", str(configs / "the_mask_debug_1f.yaml")),
        *("--longer-config", str(configs / "the_mask_debug_1f.yaml")),
        *("--temporal-config", str(configs / "the_mask_debug_video.yaml")),
        *("--output", str(tmp_path / "demo"), "--train-videos", "2", "--val-videos", "1", "--show-videos", "1"),
        *("SOLVER.MAX_ITER", "2", "MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "1"),
    ]
    monkeypatch.undo()
    register_all()


def test_everything_is_made_and_a_second_run_repeats_it(tool, arguments, tmp_path, capsys):
    assert tool.main(arguments) == 0
    out = tmp_path / "demo"
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["results"]) == {"constant", "one_frame", "one_frame_longer", "temporal"}
    for figures in summary["results"].values():
        assert 0 <= figures["mIoU"] <= 100
        assert {"VC8", "VC16", "VC8_compat", "VC16_compat"} <= set(figures)
    assert summary["results"]["constant"]["VC8_compat"] == 100
    trained = ("one_frame", "one_frame_longer", "temporal")
    steps = [f"{verb} {name}" for name in trained for verb in ("train", "evaluate")]
    assert list(summary["seconds"]) == ["data", *steps, "render", "total"]
    frames = list(open_source(out / "demo.mp4"))
    assert len(frames) == 24
    assert frames[0].shape[1] == 4 * 384 + 3 * 6
    assert read_image(out / "contact_sheet.png").shape[1] > 4 * 256
    printed = capsys.readouterr().out
    for words in ("constant prediction", "one frame", "temporal", "total", "contact_sheet.png"):
        assert words in printed

    assert tool.main(["--resume", *arguments]) == 0
    again = json.loads((out / "summary.json").read_text())
    assert again["results"] == summary["results"]
    assert "already there" in capsys.readouterr().out


def test_foreign_data_set_is_left_alone(tool, arguments, tmp_path, capsys):
    tree = tmp_path / "datasets" / "moving_shapes"
    tree.mkdir(parents=True)
    (tree / "mine.txt").write_text("x")
    assert tool.main(arguments) == 1
    assert "--force" in capsys.readouterr().err
    assert [path.name for path in tree.iterdir()] == ["mine.txt"]


def test_configs_of_different_data_sets_are_refused_before_anything_is_made(tool, arguments, tmp_path, capsys):
    assert tool.main([*arguments[:3], "moving_shapes/v3_1f_longer", *arguments[4:]]) == 1
    printed = capsys.readouterr().err
    assert "moving_shapes_v3_val" in printed
    assert "--longer-config" in printed
    assert not (tmp_path / "datasets").exists()
