"""Class lists that fit no file's content: said, though nothing is wrong with any file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import CfgNode
from tree_fixtures import write_frame

from the_mask.data import build_train_loader, get_records, register_video_tree
from the_mask.data.check import check_dataset
from the_mask.data.class_pixels import warn_about_classes


def write(root: Path, values: list[int], frames: int = 3) -> None:
    rng = np.random.default_rng(0)
    for index in range(frames):
        mask = rng.choice(values, (24, 40)).astype(np.uint8)
        write_frame(root / "train/v", str(index), mask[..., None].repeat(3, 2), mask)


def test_two_classes_stored_as_0_and_255(
    tmp_path: Path, clip_cfg: Callable[..., CfgNode], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, [0, 255])
    register_video_tree("binary", tmp_path, "train", ["background", "object"])
    report = check_dataset("binary")
    assert report.ok
    (text,) = report.warnings
    assert text.startswith(
        "only class 'background' has pixels, so every model is right. Values far outside the class ids"
    )
    assert "0..1 are ignored: 255 (" in text
    assert "{0: 0, 255: 1}" in text
    cfg = clip_cfg("binary", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2)
    build_train_loader(cfg)
    assert "data set binary: only class 'background' has pixels" in caplog.text
    # What the hint proposes.
    register_video_tree("binary", tmp_path, "train", ["background", "object"], {0: 0, 255: 1})
    assert check_dataset("binary").warnings == warn_about_classes("binary", get_records("binary")) == []


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ([0, 1], ["a", "b", "c"], "1 of 3 classes have no pixel: c"),
        ([0, 255], ["a"], "only class 'a' has pixels"),
        ([255], ["a", "b"], "no class has a pixel"),
    ],
)
def test_what_is_said(tmp_path: Path, values: list[int], names: list[str], message: str) -> None:
    write(tmp_path, values)
    register_video_tree("few", tmp_path, "train", names)
    (text,) = check_dataset("few").warnings
    assert text.startswith(message)
    assert warn_about_classes("few", get_records("few")) == [f"data set few: {text}"]


def test_a_sample_of_masks_proves_little(tmp_path: Path) -> None:
    """With many classes, absence from some masks means nothing; a single class does."""
    names = [f"c{i}" for i in range(20)]
    write(tmp_path, [3, 4], frames=40)
    register_video_tree("many", tmp_path, "train", names)
    assert warn_about_classes("many", get_records("many")) == []
    assert check_dataset("many", max_files=2).warnings[0].startswith("18 of 20 classes have no pixel in 2 of 40 frames")
    write(tmp_path, [3], frames=40)
    (text,) = warn_about_classes("many", get_records("many"))
    assert "only class 'c3' has pixels in 32 of 40 masks" in text


def test_the_tool_prints_it(tmp_path: Path) -> None:
    write(tmp_path, [0, 255])
    module = tmp_path / "mine.py"
    module.write_text(
        "from the_mask.data import register_video_tree\n"
        f"register_video_tree('binary_tool', {str(tmp_path)!r}, 'train', ['background', 'object'])\n"
    )
    tool = Path(__file__).parents[2] / "tools/check_dataset.py"
    done = subprocess.run(
        [sys.executable, tool, "binary_tool", "--import", module], capture_output=True, text=True, check=True
    )
    assert "warning: only class 'background' has pixels" in done.stdout
