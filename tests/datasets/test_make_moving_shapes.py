"""The command line of make_moving_shapes."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "datasets" / "make_moving_shapes.py"
SMALL = ["--train-videos", "1", "--val-videos", "1", "--frames", "2", "--height", "48", "--width", "64"]


@pytest.fixture
def main():
    return runpy.run_path(str(SCRIPT))["main"]


def test_it_writes_once_under_the_datasets_root(main, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert main([*SMALL, "--contact-sheet", str(tmp_path / "sheet.png")]) == 0
    assert "2 videos, 4 frames" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "moving_shapes" / "data").iterdir()) == ["train_000", "val_000"]
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    assert main(SMALL) == 0
    assert "already there" in capsys.readouterr().out


def test_problems_are_explained(main, tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    assert main([*SMALL, "--output", str(tmp_path)]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["--frames", "0", "--output", str(tmp_path / "new")]) == 1
    assert "need >= 1 video per split" in capsys.readouterr().err
