"""Fitted temperatures: recover a known one, never worse than 1."""

import numpy as np
import pytest
import torch
from tree_fixtures import write_frame

from the_mask.data import register_video_tree
from the_mask.data.registry import get_records
from the_mask.evaluation.calibration import fit_temperature, sample_pixels
from the_mask.inference.merge import normalize_scores
from the_mask.modeling.stream import NO_HINTS, Stream


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_known_temperature_is_found(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20000, 5, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0].numpy()
    sharpened = (logits * temperature).softmax(1).numpy()
    found = fit_temperature(sharpened, labels)
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert found.loss_after <= found.loss_before + 1e-9
    calibrated = normalize_scores(torch.from_numpy(sharpened).t()[..., None], "temperature", found.temperature)
    direct = -calibrated[labels, np.arange(len(labels)), 0].log().mean().item()
    assert direct == pytest.approx(found.loss_after, rel=1e-3)


def test_scores_that_do_not_sum_to_one():
    """Mask classification's scores: only their ratios matter."""
    rng = np.random.default_rng(0)
    scores, labels = rng.random((500, 4)), rng.integers(0, 4, 500)
    one, other = fit_temperature(scores, labels), fit_temperature(scores * rng.random((500, 1)) * 9, labels)
    assert one.temperature == pytest.approx(other.temperature, rel=1e-2)


def test_pixels_are_drawn_from_labelled_places(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(2):
        labels = rng.integers(0, 3, (8, 9)).astype(np.uint8)
        labels[:4] = 255
        write_frame(tmp_path / "val" / "v", str(index), labels[..., None].repeat(3, 2), labels)
    register_video_tree("calibration_toy", tmp_path, "val", ["a", "b", "c"])

    class Colours(Stream):
        def init_state(self):
            return self.new_state()

        def step(self, frame, state, hints=NO_HINTS):
            labels = torch.from_numpy(frame[..., 0].astype(np.int64))
            return torch.nn.functional.one_hot(labels.clamp(max=2), 3).permute(2, 0, 1).float(), state

    scores, labels = sample_pixels(Colours(), get_records("calibration_toy"), 255, per_frame=20)
    assert scores.shape == (40, 3)
    assert (scores.argmax(1) == labels).all()
    scores, labels = sample_pixels(Colours(), get_records("calibration_toy"), 255, per_frame=1000)
    assert len(labels) == 2 * 4 * 9


def test_bad_input():
    with pytest.raises(ValueError, match="N > 0"):
        fit_temperature(np.zeros((0, 3)), np.zeros(0, dtype=int))
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(5,\)"):
        fit_temperature(np.zeros((4, 3)), np.zeros(5, dtype=int))
