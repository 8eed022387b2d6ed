"""Keyframe policies: measures against OpenCV and hand-made cases, and the gate's hysteresis and gaps."""

import cv2
import numpy as np
import pytest
import torch

from the_mask.config import load_config
from the_mask.modeling.propagation import CopyPropagator, GSVNet, Propagated, WarpPropagator, build_policy
from the_mask.modeling.propagation.policies import (
    Gate,
    decide,
    disagreement,
    intra_weight,
    new_policy_state,
    rgb_to_hsv,
    scene_cut,
    warp_error,
)


def run(gate, values):
    """Frames (0 is the first one after a keyframe) that become keyframes, with the reasons."""
    state, gap, found = new_policy_state(), 0, []
    for number, value in enumerate(values):
        gap += 1
        verdict, state = decide(gate, state, value, gap)
        if verdict:
            found.append((number, verdict))
            gap = 0
    return found


def test_hsv_equals_opencv():
    frame = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    # Rounded to integers there; hue wraps at 180.
    expected = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV).astype(np.float32)
    ours = rgb_to_hsv(torch.from_numpy(frame).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    difference = np.abs(ours - expected)
    difference[..., 0] = np.minimum(difference[..., 0], 180 - difference[..., 0])
    assert difference.max() <= 1.0


def test_scene_cut_measures_a_cut_and_not_the_hue_circle():
    red, blue = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    red[:, 0], blue[:, 2] = 255, 255
    assert float(scene_cut()(red, red, None)) == 0
    assert float(scene_cut()(blue, red, None)) == pytest.approx(60 / 3)
    almost = red.clone()
    almost[:, 2] = 10
    assert float(scene_cut()(almost, red, None)) < 1
    assert float(scene_cut()(red * 0, red, None)) == pytest.approx(255 / 3 + 255 / 3)


def test_measures_of_the_propagator():
    scores = torch.zeros(1, 2, 2, 2)
    scores[:, 0] = 1
    intra = scores.clone()
    intra[0, 1, 0] = 5
    result = Propagated(scores, torch.tensor([0.25]), intra=intra, intra_weight=torch.tensor([0.75]))
    frames = torch.zeros(1, 3, 2, 2)
    assert float(disagreement()(frames, frames, result)) == 0.5
    assert float(warp_error()(frames, frames, result)) == 0.25
    assert float(intra_weight()(frames, frames, result)) == 0.75


def test_fixed_interval():
    gate = Gate(threshold=float("inf"), max_gap=3)
    assert run(gate, [0] * 7) == [(2, "gap"), (5, "gap")]
    assert run(Gate(threshold=float("inf"), max_gap=1), [0] * 3) == [(0, "gap"), (1, "gap"), (2, "gap")]


def test_threshold_and_minimum_gap():
    assert run(Gate(1.0), [0, 1, 1, 0]) == [(1, "measure"), (2, "measure")]
    # A cut right after a keyframe is not forgotten, only put off.
    assert run(Gate(1.0, min_gap=3), [1, 0, 0, 0]) == [(2, "measure")]
    assert run(Gate(1.0, min_gap=2, max_gap=4), [0, 0, 0, 0, 0, 1]) == [(3, "gap"), (5, "measure")]


def test_hysteresis():
    values = [0, 2, 2, 2, 0.7, 2, 0.4, 2]
    assert run(Gate(1.0, rearm=0.5), values) == [(1, "measure"), (7, "measure")]
    assert run(Gate(1.0), values) == [(1, "measure"), (2, "measure"), (3, "measure"), (5, "measure"), (7, "measure")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"POLICY": "often"}, "POLICY 'often': expected one of disagreement, interval"),
        ({"INTERVAL": 0}, "INTERVAL is 0"),
        ({"POLICY": "scene_cut", "REARM": 1.5}, "REARM is 1.5"),
        ({"POLICY": "scene_cut", "MIN_GAP": 5, "MAX_GAP": 2}, "1 <= MIN_GAP <= MAX_GAP"),
        ({"INTERVAL": 2, "MIN_GAP": 3}, "1 <= MIN_GAP <= MAX_GAP"),
        ({"POLICY": "disagreement"}, "needs the intra network"),
        ({"POLICY": "warp_error"}, "needs the flow network"),
    ],
)
def test_bad_policies(changes, message):
    words = [word for key, value in changes.items() for word in (f"MODEL.KEYFRAME.{key}", str(value))]
    with pytest.raises(ValueError, match=message):
        build_policy(load_config(None, words), CopyPropagator())


def test_policies_fit_their_propagators():
    for name, propagator in (
        ("warp_error", WarpPropagator()),
        ("disagreement", GSVNet(3)),
        ("interval", CopyPropagator()),
    ):
        cfg = load_config(None, ["MODEL.KEYFRAME.POLICY", name, "MODEL.KEYFRAME.THRESHOLD", "0.125"])
        found, _, gate = build_policy(cfg, propagator)
        assert (found, gate.threshold) == (name, 0.125)
