"""Predictions of a data set as PNGs, resumed and in several settings."""

import os

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from evaluation_cases import small_config
from PIL import Image
from tree_fixtures import write_frame

from the_mask.data import register_video_tree
from the_mask.data.whole_folder import lock_folder
from the_mask.evaluation import evaluate_dataset, evaluate_predictions
from the_mask.evaluation.submission import predict_dataset
from the_mask.inference import sinks

NAME = "submission_toy"
LENGTHS = {"a": 2, "b": 4}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for video, length in LENGTHS.items():
        for index in range(length):
            labels = rng.integers(0, 3, (40, 60)).astype(np.uint8)
            write_frame(root / "val" / video, f"{index:02d}", labels[..., None].repeat(3, 2) * 80, labels + 1)
    register_video_tree(NAME, root, "val", ["one", "two", "three"], [255, 0, 1, 2])
    return root


def config(*changes):
    return small_config(NAME, *changes)


@pytest.fixture(scope="module")
def model(tree):
    torch.manual_seed(0)
    return build_model(config())


def files(folder):
    return {str(p.relative_to(folder)): np.array(Image.open(p)) for p in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("changes", [(), ("TEST.STREAMING", True), ("TEST.VIEWS.FLIP", True), ("TEST.CLIP_LENGTH", 2)])
def test_the_files_score_as_the_evaluation_says(model, tmp_path, changes):
    cfg = config(*changes)
    assert predict_dataset(cfg, model, NAME, tmp_path / "out") == 6
    assert list(files(tmp_path / "out")) == [f"{v}/{i:02d}.png" for v, n in LENGTHS.items() for i in range(n)]
    scored = evaluate_predictions(tmp_path / "out", NAME, train_ids=True, progress=False)
    assert str(scored) == str(evaluate_dataset(cfg, model, NAME))


def test_videos_of_one_name_in_two_folders(model, tmp_path):
    rng = np.random.default_rng(1)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/val.txt").write_text("cam1/v\n./cam2/v/\n")
    for video in ("cam1/v", "cam2/v"):
        for index in range(3):
            labels = rng.integers(0, 3, (40, 60)).astype(np.uint8)
            write_frame(tmp_path / "root/data" / video, str(index), labels[..., None].repeat(3, 2) * 80, labels + 1)
    register_video_tree("submission_cameras", tmp_path / "root", "val", ["one", "two", "three"], [255, 0, 1, 2])
    cfg = config("DATASETS.TEST", ("submission_cameras",), "TEST.SAVE_SCORES", str(tmp_path / "scores"))
    predict_dataset(cfg, model, "submission_cameras", tmp_path / "out")
    assert list(files(tmp_path / "out")) == [f"cam{c}/v/{i}.png" for c in (1, 2) for i in range(3)]
    assert len(list((tmp_path / "scores").rglob("*.npz"))) == 6
    scored = evaluate_predictions(tmp_path / "out", "submission_cameras", train_ids=True, progress=False)
    assert str(scored) == str(evaluate_dataset(cfg, model, "submission_cameras"))


def test_links_out_of_the_folder_are_not_followed(model, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="symbolic link"):
        predict_dataset(config(), model, NAME, tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_raw_values_are_one_higher(model, tmp_path):
    predict_dataset(config(), model, NAME, tmp_path / "ids")
    predict_dataset(config(), model, NAME, tmp_path / "raw", "raw")
    ids, raw = files(tmp_path / "ids"), files(tmp_path / "raw")
    assert all((raw[name] == ids[name] + 1).all() for name in ids)


def test_resuming_does_only_what_is_missing(model, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    predict_dataset(config(), model, NAME, whole)

    def stop_after(count):
        real, calls = sinks.save_label_map, []

        def save(path, *rest):
            if len(calls) == count:
                raise KeyboardInterrupt
            calls.append(path)
            real(path, *rest)

        monkeypatch.setattr(sinks, "save_label_map", save)
        return calls

    stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        predict_dataset(config(), model, NAME, out)
    monkeypatch.undo()
    # Video a is whole; b, with one frame, starts anew.
    assert predict_dataset(config(), model, NAME, out) == 4
    assert predict_dataset(config(), model, NAME, out) == 0
    first, second = files(whole), files(out)
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)


def test_missing_scores_count_as_missing(model, tmp_path):
    cfg = config("TEST.SAVE_SCORES", str(tmp_path / "scores"))
    predict_dataset(config(), model, NAME, tmp_path / "out")
    assert predict_dataset(cfg, model, NAME, tmp_path / "out") == 6
    assert len(list((tmp_path / "scores").rglob("*.npz"))) == 6
    assert predict_dataset(cfg, model, NAME, tmp_path / "out") == 0


def test_two_runs_cannot_mix(model, tmp_path):
    predict_dataset(config(), model, NAME, tmp_path)
    with pytest.raises(ValueError, match=r"another run \(differs in config\)"):
        predict_dataset(config("TEST.VIEWS.FLIP", True), model, NAME, tmp_path)
    with pytest.raises(ValueError, match="differs in values"):
        predict_dataset(config(), model, NAME, tmp_path, "raw")
    with pytest.raises(ValueError, match="'palette'"):
        predict_dataset(config(), model, NAME, tmp_path, "palette")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown/a.png").touch()
    with pytest.raises(ValueError, match=r"of an unknown run \(no predictions.json\), e.g. .*a.png"):
        predict_dataset(config(), model, NAME, tmp_path / "unknown")
    # What changes no prediction may differ.
    assert predict_dataset(config("OUTPUT_DIR", "elsewhere"), model, NAME, tmp_path) == 0


@pytest.mark.parametrize("keys", [[], ["TEST.SAVE_SCORES"]])
def test_two_runs_do_not_write_at_once(model, tmp_path, keys):
    lock = lock_folder(tmp_path)
    assert lock is not None
    changes = [word for key in keys for word in (key, str(tmp_path))]
    with pytest.raises(ValueError, match="is being written by another process"):
        predict_dataset(config(*changes), model, NAME, tmp_path / "pred" if keys else tmp_path)
    key = keys[0] if keys else "TEST.SAVE_PREDICTIONS"
    with pytest.raises(ValueError, match="is being written by another process"):
        evaluate_dataset(config(key, str(tmp_path)), model, NAME)
    os.close(lock)
    assert not list(tmp_path.rglob("*.*"))


def test_retrained_weights_are_another_run(model, tmp_path):
    """The path of the weights is the same, their content is not."""
    cfg = config("MODEL.WEIGHTS", "model_final.pth", "TEST.SAVE_SCORES", str(tmp_path / "scores"))
    predict_dataset(cfg, model, NAME, tmp_path / "out")
    retrained = build_model(config()).eval()
    retrained.load_state_dict(model.state_dict())
    assert predict_dataset(cfg, retrained, NAME, tmp_path / "out") == 0
    next(retrained.parameters()).data += 1e-3
    with pytest.raises(ValueError, match=r"differs in weights\), e.g. .*png; choose another"):
        predict_dataset(cfg, retrained, NAME, tmp_path / "out")
    # Their scores, too, would be taken for those of the new weights.
    with pytest.raises(ValueError, match=r"scores holds predictions of another run \(differs in weights\), e.g. .*npz"):
        predict_dataset(cfg, retrained, NAME, tmp_path / "new")
    # An evaluation writes over them all, so that they are no longer those of the claim.
    evaluate_dataset(cfg, retrained, NAME)
    with pytest.raises(ValueError, match="unknown run"):
        predict_dataset(cfg, model, NAME, tmp_path / "new")


def test_changed_frames_and_inputs_are_another_run(model, tree, tmp_path):
    folder = tmp_path / "members"
    predict_dataset(config("TEST.SAVE_SCORES", str(folder)), model, NAME, tmp_path / "member")
    cfg = config("TEST.ENSEMBLE.SCORES", [str(folder)])
    predict_dataset(cfg, model, NAME, tmp_path / "out")
    assert predict_dataset(cfg, model, NAME, tmp_path / "out") == 0
    changed = folder / "a/00.npz"
    content = changed.read_bytes()
    changed.write_bytes((folder / "a/01.npz").read_bytes())
    with pytest.raises(ValueError, match=r"differs in inputs\)"):
        predict_dataset(cfg, model, NAME, tmp_path / "out")
    changed.write_bytes(content)
    frame = tree / "val/b/origin/03.png"
    content = frame.read_bytes()
    Image.new("RGB", (60, 40)).save(frame)
    try:
        with pytest.raises(ValueError, match=r"differs in frames\)"):
            predict_dataset(cfg, model, NAME, tmp_path / "out")
    finally:
        frame.write_bytes(content)
    assert predict_dataset(cfg, model, NAME, tmp_path / "out") == 0
