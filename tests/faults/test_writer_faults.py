"""Every writer of the library under a fault at each of its steps: the old content or the new, whole; and it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from injection import Faults, fail_everywhere, injected, kill_everywhere
from PIL import Image
from safetensors.torch import load_file

from the_mask.data.files import TEMPORARY, write_json
from the_mask.data.label_maps import save_label_map
from the_mask.inference.saved_scores import SavedScores, ScoreWriter
from the_mask.weights.averaging import average_checkpoints
from the_mask.weights.checkpoint import (
    CheckpointFolder,
    CheckpointWriteError,
    read_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from the_mask.weights.converters.files import save_state
from the_mask.weights.reading import read_weights


def state(value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((300,), float(value))}, "iteration": int(value), "numbered": []}


def value_in(path: Path) -> float:
    tensor = read_checkpoint(path)["model"]["w"]
    assert (tensor == tensor[0]).all()
    return float(tensor[0])


def started(keep: int) -> Callable[[Path], CheckpointFolder]:
    """A run with checkpoints 1 and 2, about to write 3."""

    def start(folder: Path) -> CheckpointFolder:
        run = CheckpointFolder(folder / "run", keep)
        for value in (1, 2):
            run.save_numbered(value, state(value))
        return run

    return start


def go_on(keep: int) -> Callable[[Path], None]:
    """Resume as the trainer does, and write checkpoint 3, the best and the final one."""

    def write(folder: Path) -> None:
        run = CheckpointFolder(folder / "run", keep)
        last = run.last()
        assert last is not None
        run.take_numbered(read_checkpoint(last)["numbered"], last)
        run.save_numbered(3, state(3))
        run.save_best(state(3))
        run.save_final(state(4))

    return write


def check_run(folder: Path, done: bool) -> None:
    last = CheckpointFolder(folder / "run").last()
    assert last is not None
    assert value_in(last) == 4 if done else value_in(last) in (2, 3, 4)
    for path in (folder / "run").glob("model_*.pth"):
        value_in(path)  # none is damaged
    remove_leftovers(folder / "run")
    assert not list((folder / "run").glob(f".*{TEMPORARY}"))


ALL = pytest.param(1, marks=pytest.mark.slow)


@pytest.mark.parametrize("every", [ALL, 13])
@pytest.mark.parametrize("keep", [0, 1])
def test_checkpoints_with_errors_of_the_disk(tmp_path: Path, keep: int, every: int) -> None:
    """What is raised says what to do, whichever step has failed."""
    assert fail_everywhere(go_on(keep), check_run, started(keep), tmp_path, every, CheckpointWriteError) > 60


@pytest.mark.parametrize("every", [ALL, 29])
def test_checkpoints_with_kills(tmp_path: Path, every: int) -> None:
    assert kill_everywhere(go_on(1), check_run, started(1), tmp_path, every) > 60


def _scores(folder: Path) -> None:
    ScoreWriter(folder, ["a", "b"]).write(("v", "0"), torch.full((2, 3, 4), 0.5))


def _check_scores(folder: Path, done: bool) -> None:
    if done or (folder / "v" / "0.npz").exists():
        assert SavedScores(folder).class_names == ["a", "b"]
        with np.load(folder / "v" / "0.npz") as archive:
            assert (archive["scores"] == 0.5).all()


def _png(folder: Path) -> None:
    save_label_map(folder / "v" / "0.png", np.full((3, 4), 1), [0, 7])


def _check_png(folder: Path, done: bool) -> None:
    if done or (folder / "v" / "0.png").exists():
        assert (np.array(Image.open(folder / "v" / "0.png")) == 7).all()


def _json(folder: Path) -> None:
    write_json(folder / "x.json", {"new": 1})


def _check_json(folder: Path, done: bool) -> None:
    assert json.loads((folder / "x.json").read_text()) in ([{"new": 1}] if done else [{"new": 1}, {"old": 1}])


def _old_json(folder: Path) -> None:
    (folder / "x.json").write_text('{"old": 1}')


def _converted(folder: Path) -> None:
    save_state(folder / "w.safetensors", {"w": torch.ones(3)}, "test", ["a"])
    save_state(folder / "w.pth", {"w": torch.ones(3)}, "test", ["a"])


def _check_converted(folder: Path, done: bool) -> None:
    for path in (folder / "w.safetensors", folder / "w.pth"):
        if done or path.exists():
            assert read_weights(path).state["w"].tolist() == [1, 1, 1]
    if done:
        assert load_file(folder / "w.safetensors")["w"].sum() == 3


def _average(folder: Path) -> None:
    average_checkpoints([folder / "model_a.pth"] * 2, folder / "mean.pth")


def _two(folder: Path) -> None:
    save_checkpoint(folder / "model_a.pth", state(1))
    save_checkpoint(folder / "mean.pth", state(9))


def _check_average(folder: Path, done: bool) -> None:
    assert value_in(folder / "mean.pth") in ([1] if done else [1, 9])


def _nothing(folder: Path) -> None:
    pass


WRITERS = {
    "scores": (_scores, _check_scores, _nothing),
    "label maps": (_png, _check_png, _nothing),
    "json": (_json, _check_json, _old_json),
    "converted weights": (_converted, _check_converted, _nothing),
    "averages": (_average, _check_average, _two),
}


@pytest.mark.parametrize("every", [ALL, 3])
@pytest.mark.parametrize("writer", WRITERS)
def test_other_writers_with_errors_of_the_disk(tmp_path: Path, writer: str, every: int) -> None:
    assert fail_everywhere(*WRITERS[writer], tmp_path, every) >= 4


@pytest.mark.parametrize("every", [ALL, 13])
@pytest.mark.parametrize("writer", WRITERS)
def test_other_writers_with_kills(tmp_path: Path, writer: str, every: int) -> None:
    assert kill_everywhere(*WRITERS[writer], tmp_path, every) >= 4


def test_errors_name_the_file(tmp_path: Path) -> None:
    for at in range(1, 6):
        with injected(Faults(at)), pytest.raises(OSError, match=r"x\.json"):
            write_json(tmp_path / "x.json", {})
