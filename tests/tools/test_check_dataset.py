"""The command line of check_dataset: table, one line per defect, exit code."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from the_mask.data import register_all
from the_mask.data.synthetic import SceneSize, make_moving_shapes

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_dataset.py"


@pytest.fixture
def main(tmp_path):
    spec = importlib.util.spec_from_file_location("check_dataset_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make_moving_shapes(tmp_path / "moving_shapes", 0, 2, 1, SceneSize(3, 48, 64))
    register_all(tmp_path)
    yield module.main
    register_all()


def test_a_sound_set_exits_with_zero(main, capsys):
    assert main(["moving_shapes_train"]) == 0
    out = capsys.readouterr().out
    assert "moving_shapes_train" in out
    assert "64x48 (6)" in out


def test_defects_are_listed_and_exit_with_one(main, capsys, tmp_path):
    video = tmp_path / "moving_shapes" / "data" / "train_001"
    (video / "mask" / "00000001.png").unlink()
    (video / "origin" / "00000002.jpg").write_bytes(b"junk")
    assert main(["moving_shapes_train", "--jobs", "2"]) == 1
    out = capsys.readouterr().out
    assert f"missing mask: {video / 'origin' / '00000001.jpg'}" in out
    assert f"unreadable image: {video / 'origin' / '00000002.jpg'}" in out
    assert main(["moving_shapes_train", "--show", "1"]) == 1
    assert "... and 1 more" in capsys.readouterr().out


def test_unknown_and_missing_sets_exit_with_two(main, capsys):
    assert main(["moving_shape"]) == 2
    assert "did you mean moving_shapes" in capsys.readouterr().err
    assert main(["camvid_val"]) == 2
    assert "prepare_camvid.py" in capsys.readouterr().err


def test_it_runs_as_a_script_from_anywhere(main, tmp_path):
    command = [sys.executable, str(TOOL), "moving_shapes_val", "--max-files", "2"]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "frames read" in done.stdout
