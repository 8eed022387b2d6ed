"""Every writer with a fault at each step: files hold the old or the new content, complete, and writing can go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from injection import Faults, fail_everywhere, fill_everywhere, injected, kill_everywhere
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from the_mask.data.clips import Clip
from the_mask.data.files import TEMPORARY, remove_leftovers, write_json
from the_mask.data.label_maps import save_label_map
from the_mask.data.synthetic import SceneSize, make_moving_shapes
from the_mask.inference.mask_generators import StoredMasks, encode, save_masks
from the_mask.inference.runtimes.cache import RuntimeCache
from the_mask.inference.saved_scores import SavedScores, ScoreWriter
from the_mask.inference.sinks import ClassShares, LabelFolder
from the_mask.modeling.feature_cache import FeatureCache
from the_mask.modeling.propagation.score_cache import ScoreCache
from the_mask.weights.averaging import average_checkpoints
from the_mask.weights.checkpoint import (
    CheckpointFolder,
    CheckpointWriteError,
    read_checkpoint,
    save_checkpoint,
)
from the_mask.weights.converters.files import save_state
from the_mask.weights.reading import read_weights

# Some writers turn disk errors into errors of a config key.
USER_ERRORS = (OSError, ValueError)


def state(value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((300,), float(value))}, "iteration": int(value), "numbered": []}


def value_in(path: Path) -> float:
    tensor = read_checkpoint(path)["model"]["w"]
    assert (tensor == tensor[0]).all()
    return float(tensor[0])


def started(keep: int) -> Callable[[Path], CheckpointFolder]:
    """A run that has checkpoints 1 and 2 and is about to write 3."""

    def start(folder: Path) -> CheckpointFolder:
        run = CheckpointFolder(folder / "run", keep)
        for value in (1, 2):
            run.save_numbered(value, state(value))
        return run

    return start


def go_on(keep: int) -> Callable[[Path], None]:
    """Resume as the trainer does; write checkpoint 3, the best one and the final one."""

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
        value_in(path)  # none may be damaged
    remove_leftovers(folder / "run")
    assert not list((folder / "run").glob(f".*{TEMPORARY}"))


ALL = pytest.param(1, marks=pytest.mark.slow)


@pytest.mark.parametrize("every", [ALL, 13])
@pytest.mark.parametrize("keep", [0, 1])
def test_checkpoints_with_errors_of_the_disk(tmp_path: Path, keep: int, every: int) -> None:
    """The error says what to do, whichever step failed."""
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
    save_label_map(folder, ("v", "0.png"), np.full((3, 4), 1), [0, 7])


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


def _features(folder: Path) -> None:
    backbone = nn.Conv2d(1, 1, 1)
    nn.init.ones_(backbone.weight)
    nn.init.zeros_(backbone.bias)
    features = FeatureCache(folder / "cache", 1 << 20).features(
        backbone, lambda x: {"a": backbone(x)}, torch.ones(1, 1, 2, 2)
    )
    assert features["a"].tolist() == [[[[1, 1], [1, 1]]]]


def _check_features(folder: Path, done: bool) -> None:
    with nullcontext() if done else suppress(*USER_ERRORS):  # the disk may still be full
        _features(folder)


CLIP = Clip(dataset="d", video_id="v", frame_ids=["0"], frames=[torch.ones(3, 2, 2)])


def _cached_scores(folder: Path) -> None:
    cache, segmentor = ScoreCache(folder / "cache"), nn.Identity()
    if cache.read(CLIP, 0, segmentor) is None:
        cache.write(CLIP, 0, torch.full((2, 2, 2), 0.5))


def _check_cached_scores(folder: Path, done: bool) -> None:
    with nullcontext() if done else suppress(*USER_ERRORS):  # the disk may still be full
        scores = ScoreCache(folder / "cache").read(CLIP, 0, nn.Identity())
        assert (scores is None and not done) or (scores == 0.5).all()


def _label_folder(folder: Path) -> None:
    shutil.rmtree(folder / "labels", ignore_errors=True)  # it refuses a folder with files
    sink = LabelFolder.of_video(folder / "labels", 3)
    for number in range(2):
        sink.process([Clip(frame_ids=[f"{number:08d}"])], [[np.full((3, 4), 2)]])
    sink.close()
    shares = ClassShares(folder / "shares.json", ["a", "b"], {})
    shares.process([Clip(frame_indices=[0], timestamps=[0.0])], [[np.zeros((3, 4), int)]])
    shares.close()


def _check_label_folder(folder: Path, done: bool) -> None:
    for path in (folder / "labels").glob("*.png"):
        assert (np.array(Image.open(path)) == 2).all()
    if done:
        assert sorted(path.name for path in (folder / "labels").iterdir()) == ["00000000.png", "00000001.png"]
    if done or (folder / "shares.json").exists():
        assert json.loads((folder / "shares.json").read_text())["frames"][0]["shares"] == {"a": 1.0}


def _masks(folder: Path) -> None:
    save_masks(folder, ("v", "0"), [encode(np.ones((2, 3), bool))])


def _check_masks(folder: Path, done: bool) -> None:
    if done or (folder / "v/0.json").exists():
        (mask,) = StoredMasks(folder).masks(np.zeros((2, 3, 3), np.uint8), ("v", "0"))
        assert mask["size"] == [2, 3]


def _graph(folder: Path) -> None:
    def make(path: Path) -> None:
        with open(path, "wb") as stream:
            stream.write(b"graph")

    cache = RuntimeCache(folder)
    assert cache.graph("x", make).read_bytes() == b"graph"
    cache.keep_choice("x", "eager", {})


def _check_graph(folder: Path, done: bool) -> None:
    # Where the cache cannot be written, a run goes on without it.
    assert RuntimeCache(folder).choice("x") in ("eager", None)
    graph = folder / "runtimes/x.onnx"
    assert not graph.exists() or graph.read_bytes() == b"graph"


def _shapes(folder: Path) -> None:
    make_moving_shapes(folder / "shapes", train_videos=1, val_videos=1, size=SceneSize(2, 32, 48))


def _check_shapes(folder: Path, done: bool) -> None:
    """The folder exists only when it is complete."""
    if done or (folder / "shapes").exists():
        assert len(list((folder / "shapes").rglob("*.jpg"))) == 4
        for path in (folder / "shapes").rglob("*.png"):
            assert np.array(Image.open(path)).shape == (32, 48)


WRITERS = {
    "features": (_features, _check_features, _nothing),
    "cached scores": (_cached_scores, _check_cached_scores, _nothing),
    "label folders": (_label_folder, _check_label_folder, _nothing),
    "masks": (_masks, _check_masks, _nothing),
    "graphs": (_graph, _check_graph, _nothing),
    "moving shapes": (_shapes, _check_shapes, _nothing),
    "scores": (_scores, _check_scores, _nothing),
    "label maps": (_png, _check_png, _nothing),
    "json": (_json, _check_json, _old_json),
    "converted weights": (_converted, _check_converted, _nothing),
    "averages": (_average, _check_average, _two),
}


@pytest.mark.parametrize("every", [ALL, 3])
@pytest.mark.parametrize("writer", WRITERS)
def test_other_writers_with_errors_of_the_disk(tmp_path: Path, writer: str, every: int) -> None:
    assert fail_everywhere(*WRITERS[writer], tmp_path, every, USER_ERRORS) >= 4


@pytest.mark.parametrize("every", [ALL, 13])
@pytest.mark.parametrize("writer", WRITERS)
def test_other_writers_with_kills(tmp_path: Path, writer: str, every: int) -> None:
    assert kill_everywhere(*WRITERS[writer], tmp_path, every) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_other_writers_on_a_full_disk(tmp_path: Path, writer: str) -> None:
    assert fill_everywhere(*WRITERS[writer], tmp_path, USER_ERRORS) >= 1


def test_errors_name_the_file(tmp_path: Path) -> None:
    for at in range(1, 6):
        with injected(Faults(at)), pytest.raises(OSError, match=r"x\.json"):
            write_json(tmp_path / "x.json", {})
