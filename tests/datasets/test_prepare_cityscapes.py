"""prepare_cityscapes writes train ids next to the label ids."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from the_mask.data import load_class_list

SCRIPT = Path(__file__).resolve().parents[2] / "datasets" / "prepare_cityscapes.py"
# Some labels of the release: id and name of an evaluated class, or None.
LABELS = {0: None, 4: None, 7: "road", 8: "sidewalk", 9: None, 11: "building", 17: "pole", 18: None}
LABELS |= {19: "traffic light", 23: "sky", 24: "person", 26: "car", 29: None, 31: "train", 33: "bicycle"}


def write(root: Path, values: list[int], split: str = "train") -> Path:
    path = root / "gtFine" / split / "ulm" / "ulm_000000_000019_gtFine_labelIds.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array([values], np.uint8)).save(path)
    return path.with_name("ulm_000000_000019_gtFine_labelTrainIds.png")


def run(*words: object) -> int:
    return runpy.run_path(str(SCRIPT))["main"]([str(word) for word in words])


@pytest.mark.parametrize("jobs", [1, 2])
def test_ids_by_name(tmp_path: Path, capsys: pytest.CaptureFixture, jobs: int) -> None:
    targets = [write(tmp_path, list(LABELS), split) for split in ("train", "val")]
    assert run("--root", tmp_path, "--jobs", jobs) == 0
    assert "2 masks written, 0 were there already" in capsys.readouterr().out
    names = load_class_list("cityscapes19").names
    for target in targets:
        found = np.array(Image.open(target))[0].tolist()
        assert [None if value == 255 else names[value] for value in found] == list(LABELS.values())
    assert run("--root", tmp_path) == 0
    assert "0 masks written, 2 were there already" in capsys.readouterr().out
    write(tmp_path, [33])
    assert run("--root", tmp_path) == 1
    assert "TrainIds.png is not what ulm_000000_000019_gtFine_labelIds.png gives" in capsys.readouterr().err
    assert run("--root", tmp_path, "--force") == 0
    assert np.array(Image.open(targets[0])).tolist() == [[18]]


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("--root", tmp_path) == 1
    assert "holds no *_gtFine_labelIds.png; unpack gtFine_trainvaltest.zip" in capsys.readouterr().err
    target = write(tmp_path, [7, 255])
    assert run("--root", tmp_path) == 1
    assert "labelIds.png holds label values [255]; allowed: 0..33" in capsys.readouterr().err
    assert not target.exists()
    assert len(list(target.parent.iterdir())) == 1
