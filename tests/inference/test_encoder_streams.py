"""Encoder-only models inside everything that composes streams: keyframes, views, windows, ensembles, many streams."""

import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from tolerances import assert_close

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "modeling"))

from encoder_cases import CLASSES, random_clip, randomize, tiny_config, tiny_segmentor

from the_mask.export.states import named_tensors
from the_mask.inference.ensemble import Ensemble, Member
from the_mask.inference.stream import StreamingSegmentor
from the_mask.inference.views import MultiView, make_views
from the_mask.inference.window import SlidingWindow

VIDEO = ("MODEL.ENCODER.PROPAGATE", True, "MODEL.ENCODER.MASKED_ATTENTION", False)


def streamed(stream, frames):
    state, outputs = stream.init_state(), []
    for frame in frames:
        output, state = stream.step(frame, state)
        outputs.append(output)
    return outputs, state


@pytest.mark.parametrize("carry", ["classes", "queries"])
def test_key_segmentor_of_a_propagated_one(carry):
    overrides = [
        *VIDEO,
        *("MODEL.META_ARCHITECTURE", "PropagatedSegmentor"),
        *("MODEL.KEYFRAME.SEGMENTOR", "EncoderSegmentor"),
        *("MODEL.KEYFRAME.PROPAGATOR", "copy"),
        *("MODEL.KEYFRAME.INTERVAL", 2),
        *("MODEL.KEYFRAME.CARRY", carry),
    ]
    torch.manual_seed(0)
    model = randomize(build_model(tiny_config("dinov2", *overrides))).eval()
    frames = random_clip(5).frames
    outputs, state = streamed(model, frames)
    assert all(output.shape[0] == CLASSES and torch.isfinite(output).all() for output in outputs)
    # Between keyframes the key's result is copied; the next keyframe carries the queries of the last one on.
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    # A stream of the key frames alone leaves the same queries behind.
    _, alone = streamed(model.segmentor, frames[::2])
    found = [value for name, value in named_tensors(state) if name.endswith("queries")]
    assert any(torch.equal(value, alone["queries"]) for value in found)


def test_views_and_windows_have_streams_of_their_own():
    model = tiny_segmentor("dinov2", *VIDEO)
    frames = random_clip(3, 64, 96).frames
    views = MultiView(model, make_views([1.0], True), output="scores")
    outputs, _ = streamed(SlidingWindow(model, [64, 64], [64, 32]), frames)
    left, _ = streamed(model, [frame[:, :, :64] for frame in frames])
    for output, own in zip(outputs, left, strict=True):
        torch.testing.assert_close(output[..., :8], own[..., :8])
    both, _ = streamed(views, [frame.permute(1, 2, 0).numpy() for frame in frames])
    assert len(both) == 3
    assert not torch.equal(both[0], both[2])


def test_ensemble_with_another_member():
    first, second = tiny_segmentor("dinov2", *VIDEO), tiny_segmentor("dinov3", seed=1)
    frames = [frame.permute(1, 2, 0).numpy() for frame in random_clip(3).frames]
    members = [
        Member(MultiView(model, make_views([1.0], False), output="scores"), name, None, 1.0, 1.0)
        for name, model in (("video", first), ("image", second))
    ]
    outputs, state = streamed(Ensemble(members), frames)
    assert len(outputs) == 3
    assert state["seen"] == 3


def test_streaming_segmentor_and_many_streams():
    model = tiny_segmentor("dinov2", *VIDEO)
    clips = [[frame.permute(1, 2, 0).numpy() for frame in random_clip(3, seed=seed).frames] for seed in range(2)]
    segmentor = StreamingSegmentor(tiny_config("dinov2", *VIDEO), model=model, output="scores")
    alone = [streamed(segmentor, clip)[0] for clip in clips]
    states = [segmentor.init_state() for _ in clips]
    for t in range(3):
        outputs, states = segmentor.step_many([clip[t] for clip in clips], states)
        for found, expected in zip(outputs, alone, strict=True):
            assert_close(found, expected[t], "layer")


def test_state_survives_a_file(tmp_path):
    model = tiny_segmentor("dinov2", *VIDEO)
    frames = random_clip(3).frames
    _, state = streamed(model, frames[:2])
    torch.save(state, tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(model.step(frames[2], again)[0], model.step(frames[2], state)[0])
