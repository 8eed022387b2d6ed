"""Predictions, exports and published models with a fault at each step: complete, refused by name, or absent."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from injection import INJECTED, fail_everywhere, fill_everywhere, kill_everywhere
from PIL import Image
from torch import Tensor, nn

import the_mask.modeling  # noqa: F401  (fills the registries)
from the_mask.config import load_config
from the_mask.data import register_video_tree
from the_mask.evaluation.submission import predict_dataset
from the_mask.export import export_package, package
from the_mask.export.package import SESSIONS
from the_mask.export.reading import UnsafePackageError, check_digests
from the_mask.inference.saved_scores import SavedScores
from the_mask.modeling.build import build_segmentor
from the_mask.modeling.segmentor import Segmentor
from the_mask.weights.pretrained import read_pretrained, save_pretrained
from the_mask.weights.reading import read_weights

SLOW = pytest.param(1, marks=pytest.mark.slow)
DATASET, CLASSES = "faults_predicted", ["a", "b", "c"]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class Brightness(Segmentor):
    """A segmentor that classifies by the brightness of 2 x 2 pixels."""

    score_stride = 2

    def __init__(self) -> None:
        super().__init__(num_classes=3, ignore_label=255, pixel_mean=[0.0] * 3, pixel_std=[255.0] * 3)
        self.conv = nn.Conv2d(3, 3, 2, stride=2)

    def losses(self, clips: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def group_scores(self, images: Tensor, num_frames: int) -> Iterator[Tensor]:
        yield self.conv(images).softmax(dim=1)


def model() -> Brightness:
    """A segmentor with the same weights each time."""
    torch.manual_seed(0)
    return Brightness().eval()


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Two registered videos: number of frames by name."""
    root, dice = tmp_path_factory.mktemp("frames"), np.random.default_rng(0)
    lengths = {"v": 2, "w": 1}
    for video, length in lengths.items():
        (root / "val" / video / "origin").mkdir(parents=True)
        for number in range(length):
            picture = dice.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / "val" / video / "origin" / f"{number}.png")
    register_video_tree(DATASET, root, "val", CLASSES, require_labels=False)
    return lengths


def predict(folder: Path) -> int:
    """Write predictions and scores; keep those that exist."""
    cfg = load_config(
        CONFIGS / "debug" / "the_mask_debug_1f.yaml",
        [
            *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, "DATASETS.TEST", (DATASET,), "DATALOADER.NUM_WORKERS", 0),
            *("INPUT.TEST.LONG_EDGE", 16, "INPUT.TEST.SHORT_EDGE", 12, "MODEL.DEVICE", "cpu"),
            *("TEST.SAVE_SCORES", str(folder / "scores")),
        ],
    )
    return predict_dataset(cfg, model(), DATASET, folder / "out")


@pytest.fixture(scope="module")
def whole(frames: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What a prediction without faults writes, by file."""
    folder = tmp_path_factory.mktemp("whole")
    assert predict(folder) == sum(frames.values())
    return pictures(folder)


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """Label maps in a folder of predictions, by file."""
    return {str(p.relative_to(folder)): np.array(Image.open(p)) for p in sorted((folder / "out").rglob("*.png"))}


def check_predictions(folder: Path, done: bool, whole: dict[str, np.ndarray], frames: dict[str, int]) -> None:
    """Every file equals that of a run without faults; after a complete run all exist, and every score can be read."""
    there = pictures(folder)
    assert all((labels == whole[name]).all() for name, labels in there.items())
    if done:
        assert there.keys() == whole.keys()
        scores = SavedScores(folder / "scores")
        for video, length in frames.items():
            for number in range(length):
                assert scores.read((video, str(number)), (12, 16)).argmax(0).shape == (12, 16)


@pytest.mark.parametrize("every", [SLOW, 41])
def test_predictions(tmp_path: Path, frames: dict[str, int], whole: dict[str, np.ndarray], every: int) -> None:
    def check(folder: Path, done: bool) -> None:
        check_predictions(folder, done, whole, frames)

    # Collective calls turn disk errors into ValueErrors.
    assert fail_everywhere(predict, check, lambda folder: None, tmp_path, every, (OSError, ValueError)) > 60
    assert kill_everywhere(predict, check, lambda folder: None, tmp_path, every) > 60


@pytest.mark.slow
def test_predictions_on_a_full_disk(tmp_path: Path, frames: dict[str, int], whole: dict[str, np.ndarray]) -> None:
    def check(folder: Path, done: bool) -> None:
        check_predictions(folder, done, whole, frames)

    assert fill_everywhere(predict, check, lambda folder: None, tmp_path, (OSError, ValueError)) >= 5


@pytest.mark.slow
def test_predictions_killed_a_hundred_times(
    tmp_path: Path, frames: dict[str, int], whole: dict[str, np.ndarray]
) -> None:
    """SIGKILL at random moments; each run continues the one that was killed."""
    dice, killed, folder = random.Random(0), 0, tmp_path / "run"
    begin = time.monotonic()
    predict(tmp_path / "timed")
    length = time.monotonic() - begin
    while killed < 100:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                predict(folder)
                code = 0
            finally:
                os._exit(code)
        time.sleep(dice.uniform(0, length))
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        check_predictions(folder, False, whole, frames)
        if code == 0:  # starts again
            check_predictions(folder, True, whole, frames)
            folder = tmp_path / f"run{killed}"
    INJECTED["kills at random moments"] += killed
    predict(folder)
    check_predictions(folder, True, whole, frames)


# Exported packages.

onnx_save = torch.onnx.ONNXProgram.save
FILES = {"torch": {"image.pt2"}, "onnx": {"image.onnx", "image.onnx.data"}}


@pytest.fixture
def _made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own work is done once for each format; what it writes to the disk is written each time."""
    known: dict[str, Any] = {}

    def once(name: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if name not in known:
                known[name] = real(*args, **options)
            return known[name]

        return call

    monkeypatch.setattr(package, "to_exported", once("torch", package.to_exported))
    monkeypatch.setattr(torch.onnx, "export", once("onnx", torch.onnx.export))
    # As for a large model.
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", lambda own, path: onnx_save(own, path, external_data=True))


def exporter(form: str) -> Callable[[Path], object]:
    """Writes the package of a frame program."""
    return lambda folder: export_package(
        model(), folder / "package", (8, 12), kinds=("image",), formats=(form,), frames=1
    )


def package_check(form: str) -> Callable[[Path, bool], None]:
    """A program is the old one, the new one, refused, or absent."""

    def check(folder: Path, done: bool) -> None:
        place = folder / "package"
        main = place / min(FILES[form])
        try:
            check_digests(main)
        except (UnsafePackageError, FileNotFoundError):
            assert not done
            return
        if main.read_bytes() == b"old":
            assert not done
        else:
            SESSIONS[form](main)(torch.zeros(3, 8, 12))
        if done:
            assert {path.name for path in place.iterdir()} == {"export.json", *FILES[form]}

    return check


def older(form: str) -> Callable[[Path], None]:
    """An earlier export of other weights."""

    def write(folder: Path) -> None:
        (folder / "package").mkdir()
        for name in FILES[form]:
            (folder / "package" / name).write_bytes(b"old")
        digests = dict.fromkeys(FILES[form], hashlib.sha256(b"old").hexdigest())
        programs = {"image": {"files": {form: {"file": min(FILES[form]), "sha256": digests}}}}
        (folder / "package/export.json").write_text(json.dumps({"programs": programs}))

    return write


@pytest.mark.usefixtures("_made_once")
@pytest.mark.parametrize("every", [SLOW, 19])
@pytest.mark.parametrize("form", FILES)
def test_exported_packages(tmp_path: Path, form: str, every: int) -> None:
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    export, check = exporter(form), package_check(form)
    export(tmp_path)
    check(tmp_path, True)
    for number, before in enumerate((older(form), lambda folder: None)):
        place = tmp_path / str(number)
        place.mkdir()
        assert fail_everywhere(export, check, before, place, every, (OSError, RuntimeError)) >= 8
        assert kill_everywhere(export, check, before, place, every) >= 8


@pytest.mark.usefixtures("_made_once")
def test_weights_of_an_earlier_export_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large program has a weights file; the small one that replaces it has none, and is not refused."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    exporter("onnx")(tmp_path)
    (tmp_path / "package/image.onnx.notes").touch()
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", lambda own, path: onnx_save(own, path, external_data=False))
    exporter("onnx")(tmp_path)
    assert {path.name for path in (tmp_path / "package").iterdir()} == {"export.json", "image.onnx", "image.onnx.notes"}
    (tmp_path / "package/image.onnx.notes").unlink()
    check_digests(tmp_path / "package/image.onnx")


# Models as folders.


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two configs that differ in their weights."""
    folder, found = tmp_path_factory.mktemp("weights"), []
    for seed in range(2):
        torch.manual_seed(seed)
        cfg = load_config(CONFIGS / "debug" / "swiftnet_debug.yaml", ["MODEL.DEVICE", "cpu"])
        cfg.MODEL.WEIGHTS = str(folder / f"{seed}.pth")
        torch.save(build_segmentor(cfg).state_dict(), cfg.MODEL.WEIGHTS)
        found.append(cfg)
    return found


@pytest.mark.parametrize("every", [SLOW, 31])
def test_published_models(tmp_path: Path, weights: list[Any], every: int) -> None:
    """A folder holds the old model, the new one, or is refused; a mixture of both is never loaded."""
    first, second = (read_weights(cfg.MODEL.WEIGHTS).state for cfg in weights)
    name = next(name for name, value in first.items() if value.is_floating_point() and (value != second[name]).any())

    def check(folder: Path, finished: bool) -> None:
        done = finished
        if not done:
            with suppress(ValueError, FileNotFoundError):
                read_pretrained(folder / "model")
                done = True
        if not done:
            return
        cfg, _ = read_pretrained(folder / "model")
        value = read_weights(cfg.MODEL.WEIGHTS).state[name]
        assert torch.equal(value, second[name]) or (not finished and torch.equal(value, first[name]))

    def write(folder: Path) -> None:
        save_pretrained(weights[1], folder / "model")

    def before(folder: Path) -> None:
        save_pretrained(weights[0], folder / "model")

    assert fail_everywhere(write, check, before, tmp_path, every) >= 20
    assert kill_everywhere(write, check, before, tmp_path, 2 * every) >= 20
