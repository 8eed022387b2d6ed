"""tools/evaluate_predictions.py on a small tree: scores, and every kind of bad file."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from the_mask.data import register_video_tree
from the_mask.evaluation import (
    PredictionErrors,
    confusion_matrix,
    constant_baseline,
    evaluate_predictions,
    iou_from_confusion,
)

TOOL = Path(__file__).parents[2] / "tools" / "evaluate_predictions.py"
NAME = "predictions_toy"
LENGTHS = {"a": 9, "b": 18}
# Raw values 1..3 are classes 0..2; 0 and 255 are ignored.
TABLE = [255, 0, 1, 2, *[-1] * 251, 255]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("evaluate_predictions_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    """A registered data set of two videos; returns (folder of perfect raw predictions, truth by video)."""
    rng = np.random.default_rng(0)
    truth = {}
    for video, length in LENGTHS.items():
        truth[video] = rng.integers(0, 4, (length, 6, 8)).astype(np.uint8)
        for index, mask in enumerate(truth[video]):
            for kind, pixels, suffix in (("origin", mask * 20, "jpg"), ("mask", mask, "png")):
                path = tmp_path / "set" / "data" / video / kind / f"{index:03d}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
            path = tmp_path / "pred" / video / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    (tmp_path / "set" / "val.txt").write_text("a\nb\n")
    register_video_tree(NAME, tmp_path / "set", "val", ["one", "two", "three"], TABLE)
    return tmp_path / "pred", truth


def write(folder, video, index, array):
    Image.fromarray(array).save(folder / video / f"{index:03d}.png")


def test_perfect_predictions(tree, tool, capsys, tmp_path):
    folder, _ = tree
    out = tmp_path / "out" / "figures.json"
    assert tool.main(["--pred", str(folder), "--dataset", NAME, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["mIoU"] == figures["pACC"] == 100
    assert figures["VC8"] is None, "nothing holds still in noise"
    assert "2 videos, 27 frames" in capsys.readouterr().out


@pytest.mark.parametrize("train_ids", [False, True])
def test_scores_equal_the_pure_functions(tree, train_ids):
    folder, truth = tree
    rng = np.random.default_rng(1)
    confusion = np.zeros((3, 3), dtype=np.int64)
    for video, masks in truth.items():
        for index, mask in enumerate(masks):
            pred = rng.integers(0, 3, mask.shape).astype(np.uint8)
            write(folder, video, index, pred if train_ids else pred + 1)
            gt = np.where(mask == 0, 255, mask.astype(int) - 1)
            confusion += confusion_matrix(pred, gt, 3)
    results = evaluate_predictions(folder, NAME, train_ids=train_ids)["sem_seg"]
    assert results["mIoU"] == pytest.approx(100 * iou_from_confusion(confusion)["mIoU"], abs=1e-10)


def test_every_missing_file_is_listed(tree, tool, capsys):
    folder, _ = tree
    for index in (0, 17):
        (folder / "b" / f"{index:03d}.png").unlink()
    (folder / "a" / "003.png").unlink()
    assert tool.main(["--pred", str(folder), "--dataset", NAME]) == 1
    message = capsys.readouterr().err
    assert "3 problems" in message
    for name in ("a/003.png", "b/000.png", "b/017.png"):
        assert str(folder / name) in message


def test_every_bad_file_is_listed(tree):
    folder, truth = tree
    write(folder, "a", 1, truth["a"][1][:-1])
    write(folder, "a", 2, np.full((6, 8), 77, dtype=np.uint8))
    write(folder, "b", 3, np.zeros((6, 8, 3), dtype=np.uint8))
    write(folder, "b", 4, np.zeros((6, 8), dtype=np.uint8))
    (folder / "b" / "005.png").write_bytes((folder / "b" / "006.png").read_bytes()[:40])
    with pytest.raises(PredictionErrors) as caught:
        evaluate_predictions(folder, NAME)
    found = caught.value.problems
    assert len(found) == 5
    labelled = np.count_nonzero(truth["b"][4])
    for problem, name, reason in zip(
        found,
        ("a/001.png", "a/002.png", "b/003.png", "b/004.png", "b/005.png"),
        ("size (5, 8), its ground truth (6, 8)", "[77]", "mode RGB", f"ignored for {labelled} pixels", "truncated"),
        strict=True,
    ):
        assert str(folder / name) in problem
        assert reason in problem


def test_raw_values_read_as_train_ids_are_caught(tree):
    folder, _ = tree
    with pytest.raises(PredictionErrors, match=r"000\.png: prediction \(read as train ids\) holds illegal class ids 3"):
        evaluate_predictions(folder, NAME, train_ids=True)


def test_other_pngs_are_reported(tree, caplog):
    folder, truth = tree
    write(folder, "a", 100, truth["a"][0])
    evaluate_predictions(folder, NAME)
    assert "1 PNGs that belong to no frame" in caplog.text


def test_unknown_folder_and_data_set(tree, tool, capsys, tmp_path):
    assert tool.main(["--pred", str(tmp_path / "nowhere"), "--dataset", NAME]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert tool.main(["--pred", str(tmp_path), "--dataset", "predictions_tox"]) == 1
    assert f"did you mean {NAME}" in capsys.readouterr().err


def test_constant_baseline_is_the_best_constant_prediction(tree, tool, capsys):
    folder, truth = tree
    scores = {}
    for raw in (1, 2, 3):
        for video, masks in truth.items():
            for index, mask in enumerate(masks):
                write(folder, video, index, np.full_like(mask, raw))
        scores[raw] = evaluate_predictions(folder, NAME)
    best = max(scores, key=lambda raw: scores[raw]["sem_seg"]["mIoU"])
    name, results = constant_baseline(NAME)
    assert name == ["one", "two", "three"][best - 1]
    assert str(results) == str(scores[best])
    assert results["sem_seg"]["VC8_compat"] != results["sem_seg"]["VC8"]
    assert tool.main(["--constant", "--dataset", NAME]) == 0
    assert f"predicted as {name}" in capsys.readouterr().out


def test_data_set_without_ground_truth(tree, tmp_path):
    folder, _ = tree
    for mask in (tmp_path / "set" / "data").rglob("mask/*.png"):
        mask.unlink()
    register_video_tree(NAME, tmp_path / "set", "val", ["one", "two", "three"], TABLE, require_labels=False)
    with pytest.raises(ValueError, match="no ground truth"):
        evaluate_predictions(folder, NAME)


def test_broken_raft_weights(tree, tool, capsys, tmp_path):
    folder, _ = tree
    arguments = ["--pred", str(folder), "--dataset", NAME, "--tc-weights", str(tmp_path / "raft.pth")]
    assert tool.main(arguments) == 1
    assert "raft.pth do not exist" in capsys.readouterr().err
