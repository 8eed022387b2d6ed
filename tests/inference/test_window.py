"""Sliding windows: placement, equality with the whole image, states per window, padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from toy_segmentor import ToySegmentor

from the_mask.data.clips import Clip
from the_mask.inference.window import SlidingWindow, window_starts
from the_mask.modeling.pixel.context.prior_map import PriorMap
from the_mask.modeling.stream import Hints


def image(height, width, seed=0):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 80), st.integers(1, 80), st.sampled_from([1, 4, 8]))
def test_windows_cover_everything_on_whole_cells(length, window, stride, cell):
    window, stride = max(window, cell), min(stride, window)
    starts = window_starts(length, window, stride, cell)
    covered = [0] * length
    for start in starts:
        assert start % cell == 0
        assert 0 <= start < length
        for i in range(start, min(start + window, length)):
            covered[i] += 1
    # Windows of at least one cell, apart by at most a window, leave no gap unless the window is no multiple of a cell.
    if window % cell == 0 or len(starts) == 1:
        assert min(covered) >= 1
    assert len(set(starts)) == len(starts)
    assert starts[-1] + window >= length


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("size", [(37, 50), (64, 33), (16, 24), (10, 9)])
@pytest.mark.parametrize("pad", [True, False])
def test_windows_equal_the_whole_image_of_a_translation_invariant_model(stride, size, pad):
    model = ToySegmentor(stride=stride).eval()
    frame = image(*size)
    whole, _ = model.step(frame, model.init_state())
    runner = SlidingWindow(model, (16, 24), (8, 16), pad)
    scores, _ = runner.step(frame, runner.init_state())
    (clip,) = runner.score_maps([Clip([frame, frame.flip(-1)])])
    assert scores.dtype == torch.float32
    assert_close(scores, whole, "unit")
    assert_close(clip[0], whole, "unit")
    assert_close(clip[1], model.score_maps([Clip([frame.flip(-1)])])[0][0], "unit")


def test_a_single_window_is_the_plain_model():
    model = ToySegmentor(stride=4).eval()
    frame = image(30, 40)
    runner = SlidingWindow(model, (64, 64), None, pad=False)
    assert torch.equal(runner.step(frame, runner.init_state())[0], model.step(frame, model.init_state())[0])
    assert model.sizes == [(30, 40)] * 2


def test_overlaps_are_averaged():
    """Against a loop over pixels, with a model that answers by where the window is."""

    class Position(ToySegmentor):
        calls = 0

        def scores(self, frame):
            self.calls += 1
            return torch.full((3, *frame.shape[-2:]), float(self.calls))

    runner = SlidingWindow(Position().eval(), (4, 4), (2, 3))
    scores, _ = runner.step(image(7, 8), runner.init_state())
    for y in range(7):
        for x in range(8):
            hits = [i + 1 for i, (t, le, b, r) in enumerate(runner.boxes(7, 8)) if t <= y < b and le <= x < r]
            assert scores[0, y, x].item() == pytest.approx(sum(hits) / len(hits))


def test_every_window_is_a_stream_of_its_own():
    model = ToySegmentor(memory=0.5).eval()
    frames = [image(20, 20, seed) for seed in range(3)]
    runner = SlidingWindow(model, (12, 12), (8, 8))
    state, plain = runner.init_state(), model.init_state()
    for frame in frames:
        scores, state = runner.step(frame, state)
        expected, plain = model.step(frame, plain)
    assert_close(scores, expected, "unit")
    assert len(state["windows"]) == 4
    # Another size starts anew.
    other, state = runner.step(image(24, 20), state)
    assert_close(other, model.step(image(24, 20), model.init_state())[0], "unit")


def test_priors_are_cropped_with_the_window():
    model = ToySegmentor().eval()
    frame = image(20, 20)
    labels = torch.randint(0, 3, (1, 20, 20), generator=torch.Generator().manual_seed(1))
    prior = PriorMap.from_labels(labels, 3)
    runner = SlidingWindow(model, (12, 12), (8, 8))
    scores, _ = runner.step(frame, runner.init_state(), Hints(prior=prior))
    assert_close(scores, model.step(frame, model.init_state(), Hints(prior=prior))[0], "unit")


def test_padding_of_small_inputs():
    model = ToySegmentor(stride=4).eval()
    runner = SlidingWindow(model, (32, 32), None, pad=True)
    scores, _ = runner.step(image(10, 40), runner.init_state())
    assert set(model.sizes) == {(32, 32)}
    assert scores.shape == (3, 3, 10)
    assert runner.size_divisibility == 1


@pytest.mark.parametrize(
    ("size", "stride", "message"),
    [
        ((16,), None, "SIZE"),
        ((16, 0), None, "SIZE"),
        ((16.0, 16), None, "SIZE"),
        ((16, 16), (8, 0), "STRIDE"),
        ((16, 16), (8, 17), "gaps"),
    ],
)
def test_bad_windows(size, stride, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindow(ToySegmentor(), size, stride)
