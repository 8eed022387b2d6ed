"""evaluate_dataset with the streams of TEST.*: real tiny models on a tiny tree."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from evaluation_cases import small_config
from PIL import Image
from tree_fixtures import write_frame

from the_mask.data import register_video_tree
from the_mask.evaluation import evaluate_dataset
from the_mask.inference.compose import build_stream, config_problems, is_plain
from the_mask.modeling.stream import Hints
from the_mask.weights import save_checkpoint

NAME = "stream_toy"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for video, length in {"a": 2, "b": 3}.items():
        for index in range(length):
            labels = np.kron(rng.integers(0, 3, (4, 5)), np.ones((10, 12), dtype=np.int64)).astype(np.uint8)
            noise = rng.integers(0, 40, (40, 60, 3))
            write_frame(root / "val" / video, f"{index:02d}", labels[..., None] * 80 + noise, labels)
    register_video_tree(NAME, root, "val", ["one", "two", "three"])
    register_video_tree("stream_other", root, "val", ["one", "two", "four"])
    return root


def config(*changes):
    return small_config(NAME, *changes)


@pytest.fixture(scope="module")
def model(tree):
    torch.manual_seed(0)
    return build_model(config())


def figures(model, *changes):
    return evaluate_dataset(config(*changes), model, NAME)["sem_seg"]


def test_nothing_is_wrapped_by_default(tree):
    assert is_plain(config())


@pytest.mark.parametrize("streaming", [False, True])
def test_views_equal_the_stream_called_by_hand(tree, model, streaming, tmp_path):
    changes = ["TEST.VIEWS.SCALES", [1.0, 1.5], "TEST.VIEWS.FLIP", True, "TEST.SAVE_PREDICTIONS", str(tmp_path)]
    result = figures(model, *changes, "TEST.STREAMING", streaming)
    assert str(result) != str(figures(model))
    stream = build_stream(config(*changes), model)
    state = stream.init_state()
    for index in range(3):
        picture = np.array(Image.open(tree / "val" / "b" / "origin" / f"{index:02d}.png"))
        labels, state = stream.step(picture, state, Hints(name=("b", f"{index:02d}")))
        assert (np.array(Image.open(tmp_path / "b" / f"{index:02d}.png")) == labels.numpy()).all()


def test_windows_of_the_whole_frame_change_nothing(tree, model):
    assert str(figures(model, "TEST.WINDOW.SIZE", [64, 96], "TEST.WINDOW.PAD", False)) == str(figures(model))
    smaller = figures(model, "TEST.WINDOW.SIZE", [64, 64])
    assert str(smaller) != str(figures(model))


def test_an_ensemble_with_itself_from_config_and_weights_or_from_disk(tree, model, tmp_path):
    save_checkpoint(tmp_path / "model.pth", {"model": model.state_dict()})
    expected = str(figures(model))
    twin = ["TEST.ENSEMBLE.CONFIGS", [str(tmp_path / "member.yaml")]]
    twin += ["TEST.ENSEMBLE.CHECKPOINTS", [str(tmp_path / "model.pth")]]
    (tmp_path / "member.yaml").write_text(config().dump())
    assert str(figures(model, *twin)) == expected
    assert str(figures(model, *twin, "TEST.ENSEMBLE.MEAN", "geometric")) == expected
    saved = ["TEST.SAVE_SCORES", str(tmp_path / "scores")]
    assert str(figures(model, *saved)) == expected
    disk = ["TEST.ENSEMBLE.SCORES", [str(tmp_path / "scores")], "TEST.ENSEMBLE.WITHOUT_SELF", True]
    from_disk = figures(model, *disk)
    # Half precision may swap the best class of a pixel or two.
    assert from_disk["pACC"] == pytest.approx(figures(model)["pACC"], abs=0.1)
    (tmp_path / "scores" / "b" / "01.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"01\.npz is missing"):
        figures(model, *disk)


def test_bad_ensembles(tree, model, tmp_path):
    with pytest.raises(ValueError, match="1 CONFIGS and 0 CHECKPOINTS"):
        figures(model, "TEST.ENSEMBLE.CONFIGS", ["a.yaml"])
    with pytest.raises(FileNotFoundError, match=r"a\.yaml"):
        figures(model, "TEST.ENSEMBLE.CONFIGS", ["a.yaml"], "TEST.ENSEMBLE.CHECKPOINTS", ["a.pth"])
    with pytest.raises(FileNotFoundError, match=r"scores\.json"):
        figures(model, "TEST.ENSEMBLE.SCORES", [str(tmp_path)])
    evaluate_dataset(
        config("TEST.SAVE_SCORES", str(tmp_path), "DATASETS.TEST", ("stream_other",)), model, "stream_other"
    )
    with pytest.raises(ValueError, match="2 is 'four', in the config's own model 'three'"):
        figures(model, "TEST.ENSEMBLE.SCORES", [str(tmp_path)])
    with pytest.raises(ValueError, match="WEIGHTS has 3 numbers for 2 members"):
        figures(model, "TEST.ENSEMBLE.SCORES", [str(tmp_path)], "TEST.ENSEMBLE.WEIGHTS", [1, 2, 3])
    with pytest.raises(ValueError, match=r"WINDOW\.STRIDE .* without"):
        build_stream(config("TEST.WINDOW.STRIDE", [4, 4]), model)


def test_voting_with_superpixels_and_with_their_files(tree, model, tmp_path):
    masks = ["TEST.VOTING.SAVE_MASKS", str(tmp_path), "TEST.VOTING.SEGMENTS", 20]
    voted = figures(model, "TEST.VOTING.MASKS", "superpixels", *masks)
    assert len(list(tmp_path.glob("*/*.json"))) == 5
    files = ["TEST.VOTING.MASKS", "files", "TEST.VOTING.FOLDER", str(tmp_path)]
    assert str(figures(model, *files)) == str(voted)
    assert str(figures(model, *files, "TEST.STREAMING", True)) == str(voted)


def test_boundary_iou_is_one_more_figure(tree, model):
    plain, more = figures(model), figures(model, "TEST.BOUNDARY_RATIO", 0.02)
    assert 0 <= more.pop("BIoU") <= 100
    assert str(more) == str(plain)


def test_bad_keys_show_before_anything_runs():
    assert not list(config_problems(config()))
    wrong = {
        "TEST.VIEWS.SCALES": [],
        "TEST.VIEWS.NORMALIZE": "l1",
        "TEST.ENSEMBLE.MEAN": "median",
        "TEST.WINDOW.SIZE": [32],
        "TEST.VIEWS.PARITY": "paddle",
        "TEST.VOTING.MASKS": "fastsam",
        "TEST.VOTING.MIN_MAJORITY": 1.5,
        "TEST.BOUNDARY_RATIO": -0.1,
    }
    problems = list(config_problems(config(*(part for item in wrong.items() for part in item))))
    assert len(problems) == len(wrong)
    for key in wrong:
        assert sum(key in problem for problem in problems) == 1
