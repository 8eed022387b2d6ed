"""Ensembles and saved scores."""

import numpy as np
import pytest
import torch
from tolerances import assert_close
from toy_segmentor import ToySegmentor

from the_mask.inference.ensemble import Ensemble, Member
from the_mask.inference.merge import merge_scores, normalize_scores
from the_mask.inference.saved_scores import SavedScores, ScoreWriter, score_path
from the_mask.inference.views import MultiView, make_views
from the_mask.modeling.stream import Hints

NAMES = ["a", "b", "c"]


def frame(seed=0, height=30, width=44):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def scorer(seed=0, **options):
    return MultiView(ToySegmentor(seed=seed, **options), output="scores")


def run(stream, frames=3):
    state, results = stream.init_state(), []
    for seed in range(frames):
        result, state = stream.step(frame(seed), state, Hints(name=("v", str(seed))))
        results.append(result)
    return results


@pytest.mark.parametrize("normalization", ["none", "sum-to-one", "softmax", "temperature"])
@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_a_model_with_itself_is_that_model(normalization, mean):
    twins = Ensemble([Member(scorer(memory=0.5), "one"), Member(scorer(memory=0.5), "two")], normalization, mean)
    single = scorer(memory=0.5)
    for result, expected in zip(run(twins), run(single), strict=True):
        expected = normalize_scores(expected, normalization)
        if mean == "arithmetic":
            assert torch.equal(result, expected)
        else:
            assert_close(result, expected, "formula")


def test_members_keep_their_own_preprocessing_and_state():
    members = [
        Member(scorer(0, memory=0.5, stride=4), "one", weight=2.0, temperature=1.5),
        Member(MultiView(ToySegmentor(seed=1), make_views([0.5, 1.0], True), output="scores"), "two", temperature=0.7),
    ]
    merged = run(Ensemble(members, "temperature", "geometric"))
    apart = [run(member.stream) for member in members]
    for index, result in enumerate(merged):
        expected = merge_scores([scores[index] for scores in apart], "temperature", "geometric", [2.0, 1.0], [1.5, 0.7])
        assert_close(result, expected, "formula")


def test_saved_scores_play_back_in_half_precision(tmp_path):
    writer = ScoreWriter(tmp_path, NAMES)
    scores = run(scorer())
    for index, value in enumerate(scores):
        writer.write(("v", str(index)), value)
    saved = SavedScores(tmp_path)
    assert saved.num_classes == 3
    for result, expected in zip(run(saved), scores, strict=True):
        assert torch.equal(result, expected.half().float())
    both = Ensemble([Member(saved, "disk", NAMES), Member(scorer(), "model", NAMES)], "none")
    for result, expected in zip(run(both), scores, strict=True):
        assert_close(result, expected, "stored half")
    # Written once more, and nothing but the files is left.
    ScoreWriter(tmp_path, NAMES).write(("v", "0"), scores[0])
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["0.npz", "1.npz", "2.npz", "scores.json"]


def test_files_are_compressed(tmp_path):
    scores = torch.zeros(3, 100, 100)
    scores[1] = 0.9
    path = ScoreWriter(tmp_path, NAMES).write(("v", "0"), scores)
    assert path.stat().st_size < scores.numel() * 2 / 20


def test_missing_and_damaged_scores_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scores\.json is missing"):
        SavedScores(tmp_path)
    writer = ScoreWriter(tmp_path, NAMES)
    path = writer.write(("v", "0"), torch.rand(3, 30, 44))
    saved = SavedScores(tmp_path)
    state = saved.init_state()
    with pytest.raises(FileNotFoundError, match=r"v.1\.npz is missing \(video v, frame 1\)"):
        saved.step(frame(), state, Hints(name=("v", "1")))
    with pytest.raises(ValueError, match="no name"):
        saved.step(frame(), state)
    with pytest.raises(ValueError, match=r"0\.npz .*of shape \[3, 30, 44\], expected float16 of \[3, 30, 45\]"):
        saved.step(frame(width=45), state, Hints(name=("v", "0")))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"0\.npz cannot be read"):
        saved.step(frame(), state, Hints(name=("v", "0")))
    assert score_path(tmp_path, ("v", "0")) == path


def test_scores_of_other_classes(tmp_path):
    writer = ScoreWriter(tmp_path, NAMES)
    with pytest.raises(ValueError, match="for 3 classes"):
        writer.write(("v", "0"), torch.rand(4, 2, 2))
    with pytest.raises(ValueError, match="beyond float16"):
        writer.write(("v", "0"), torch.full((3, 2, 2), 1e6))
    with pytest.raises(ValueError, match="has others: 1 of 3 classes have another name: 2 is 'c', in this model 'd'"):
        ScoreWriter(tmp_path, ["a", "b", "d"])
    saved = SavedScores(tmp_path)
    with pytest.raises(ValueError, match="disk has others: 1 of 3 classes have another name: 0 is 'a', in model 'x'"):
        Ensemble([Member(scorer(), "model", ["x", "b", "c"]), Member(saved, "disk", saved.class_names)])
    with pytest.raises(ValueError, match="three has 3, four 4"):
        Ensemble([Member(scorer(), "three"), Member(scorer(num_classes=4), "four")])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"weight": 0.0}, "WEIGHTS: one has 0"), ({"temperature": -1.0}, "TEMPERATURES: one has -1")],
)
def test_bad_members(options, message):
    with pytest.raises(ValueError, match=message):
        Ensemble([Member(scorer(), "one", **options)])
    with pytest.raises(ValueError, match="without members"):
        Ensemble([])
    with pytest.raises(ValueError, match="NORMALIZE 'l1'"):
        Ensemble([Member(scorer(), "one")], "l1")
    with pytest.raises(ValueError, match="not a state"):
        Ensemble([Member(scorer(), "one")]).step(frame(), {})
