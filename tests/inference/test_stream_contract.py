"""What every stream promises: one form of state, one rule for a change of size, batches that change nothing."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from toy_segmentor import ToySegmentor

import the_mask.modeling  # noqa: F401
from the_mask.config import load_config
from the_mask.inference import MultiView, SlidingWindow, StreamingSegmentor, make_views
from the_mask.inference.compose import PostProcess
from the_mask.inference.ensemble import Ensemble, Member
from the_mask.inference.saved_scores import SavedScores, ScoreWriter
from the_mask.inference.stages import MultiStage
from the_mask.modeling.pixel.distilled import DistilledSegmentor
from the_mask.modeling.stream import STATE_VERSION, Hints, Ring

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BEFORE, AFTER = (64, 64), (96, 64)
SMALL = ["MODEL.DEVICE", "cpu", "TEST.CLIP_STRIDE", 1, "INPUT.TEST.LONG_EDGE", 96, "INPUT.TEST.SHORT_EDGE", 64]


def model(name, *options):
    torch.manual_seed(0)
    return build_model(load_config(CONFIGS / f"{name}.yaml", [*SMALL, *options])).eval()


def encoder(*options):
    """A tiny encoder-only model."""
    pytest.importorskip("timm")
    tiny = {"NAME": "vit_tiny_patch16_224", "IMG_SIZE": 64, "WIDTH": 48, "DEPTH": 2, "HEADS": 4}
    changes = [x for key, value in tiny.items() for x in (f"MODEL.VIT.{key}", value)]
    changes += ["MODEL.META_ARCHITECTURE", "EncoderSegmentor", "MODEL.BACKBONE.NAME", "build_vit_backbone"]
    changes += ["MODEL.ENCODER.NUM_BLOCKS", 1, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 6, "MODEL.DEVICE", "cpu"]
    torch.manual_seed(0)
    return build_model(load_config(None, [*changes, *options])).eval()


def filled(model):
    """With something in the class memory, as after training."""
    for module in model.modules():
        if hasattr(module, "rows"):
            torch.nn.init.normal_(module.rows)
            module.seen.fill_(True)
    return model


def distilled(name):
    return DistilledSegmentor(student=model(name), build_teacher=lambda: pytest.fail("no teacher in a stream")).eval()


def toy(memory=0.5):
    return MultiView(ToySegmentor(stride=4, memory=memory), output="scores")


def saved(folder):
    writer = ScoreWriter(folder, ["a", "b", "c"])
    for index in range(4):
        writer.write(("v", str(index)), torch.rand(3, *(BEFORE if index < 2 else AFTER)))
    return SavedScores(folder)


# Whether a segmentor takes network input [3, H, W], and how it is made.
SEGMENTORS = {
    "mask": lambda _: model("debug/the_mask_debug_video", "TEST.CLIP_LENGTH", 2),
    "image mask": lambda _: model("debug/the_mask_debug_video", "TEST.CLIP_LENGTH", 1),
    "memory": lambda _: model("camvid/tmanet_r18_T2_cpu"),
    "pixel": lambda _: model("debug/swiftnet_debug"),
    "propagated": lambda _: model("debug/gsvnet_debug", "MODEL.KEYFRAME.INTERVAL", 2),
    "prior": lambda _: filled(model("debug/decoderA_debug")),
    "distilled": lambda _: distilled("debug/swiftnet_debug"),
    "distilled memory": lambda _: distilled("camvid/tmanet_r18_T2_cpu"),
    "encoder": lambda _: encoder(),
    "encoder queries": lambda _: encoder("MODEL.ENCODER.PROPAGATE", True, "MODEL.ENCODER.MASKED_ATTENTION", False),
    "window": lambda _: SlidingWindow(ToySegmentor(stride=4, memory=0.5).eval(), (48, 48)),
}
PICTURES = {
    "streaming": lambda _: StreamingSegmentor(load_config(None, SMALL), model("debug/gsvnet_debug")),
    "views": lambda _: MultiView(ToySegmentor(stride=4, memory=0.5), make_views([1.0, 1.5], True)),
    "stages": lambda _: MultiStage(toy(), 2, "previous_frame"),
    "ensemble": lambda _: Ensemble([Member(toy(), "one"), Member(toy(0.25), "two")]),
    "post-processing": lambda _: PostProcess(toy()),
    "saved": saved,
}
STREAMS = {**SEGMENTORS, **PICTURES}


def video(kind, sizes, seed=0):
    """A frame and its hints for every size."""
    rng = np.random.default_rng(seed)
    frames = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    if kind in SEGMENTORS:
        frames = [torch.from_numpy(frame).permute(2, 0, 1) for frame in frames]
    return [(frame, Hints(name=("v", str(index)))) for index, frame in enumerate(frames)]


def run(stream, frames, state=None):
    state, outputs = stream.init_state() if state is None else state, []
    for frame, hints in frames:
        output, state = stream.step(frame, state, hints)
        outputs.append(output)
    return outputs, state


def assert_same(a, b):
    """Two states, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


@pytest.fixture(params=STREAMS, scope="module")
def case(request, tmp_path_factory):
    return request.param, STREAMS[request.param](tmp_path_factory.mktemp("stream"))


def test_a_change_of_size_starts_the_stream_anew(case):
    kind, stream = case
    frames = video(kind, [BEFORE, BEFORE, AFTER, AFTER])
    outputs, state = run(stream, frames)
    fresh, expected = run(stream, frames[2:])
    for result, right in zip(outputs[2:], fresh, strict=True):
        assert torch.equal(result, right)
    assert (state["size"], state["seen"], state["resets"]) == (list(AFTER), 2, 1)
    assert_same({**state, "resets": 0}, expected)


def test_states_survive_a_file_and_are_not_changed(case):
    kind, stream = case
    frames = video(kind, [BEFORE, BEFORE])
    _, state = run(stream, frames[:1])
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    outputs, after = run(stream, frames[1:], state)
    assert_same(state, loaded)
    again, after_again = run(stream, frames[1:], loaded)
    assert torch.equal(outputs[0], again[0])
    assert_same(after, after_again)


def test_foreign_and_old_states_are_refused_by_name(case):
    kind, stream = case
    ((frame, hints),) = video(kind, [BEFORE])
    state = stream.init_state()
    assert state["version"] == STATE_VERSION
    own = state["stream"]
    bad = {
        f"not a state of {own}; make one with init_state": {},
        "of version 0, but this the_mask reads version 1: start the stream anew": {"size": [], "resets": 0},
        "of version 2, but this": {**state, "version": 2},
        f"a state of Other, not of {own}": {**state, "stream": "Other"},
    }
    for message, wrong in bad.items():
        with pytest.raises(ValueError, match=message):
            stream.step(frame, wrong, hints)


def test_streams_advanced_together_are_those_advanced_alone(case):
    kind, stream = case
    sizes = [[BEFORE, BEFORE], [AFTER, AFTER], [BEFORE, AFTER]]
    if kind == "saved":
        sizes = sizes[:1]
    videos = [video(kind, own, seed) for seed, own in enumerate(sizes)]
    states = [stream.init_state() for _ in videos]
    for index in range(2):
        frames, hints = zip(*(own[index] for own in videos))
        outputs, states = stream.step_many(frames, states, hints)
    for own, output, state in zip(videos, outputs, states, strict=True):
        expected, right = run(stream, own)
        # Batches may round otherwise.
        assert_close(expected[-1], output.float(), "network")
        assert {k: state[k] for k in ("stream", "size", "seen", "resets")} == {
            k: right[k] for k in ("stream", "size", "seen", "resets")
        }


def test_looks_back_is_true_of_what_frames_before_change(case):
    kind, stream = case
    first, second = video(kind, [BEFORE, BEFORE])
    (other,) = video(kind, [BEFORE], seed=9)
    output = run(stream, [first, second])[0][1]
    changed = run(stream, [other, second])[0][1]
    assert stream.looks_back == (not torch.equal(output, changed))


def test_a_keyframe_on_request():
    stream = PICTURES["streaming"](None)
    (frame, _), *rest = video("streaming", [BEFORE] * 3)
    state = run(stream, [(frame, Hints())])[1]
    assert stream.keyframe_interval > 2
    for wanted in (False, True):
        _, after = stream.step(rest[0][0], state, Hints(keyframe=wanted))
        assert stream.is_keyframe(after) is wanted
    assert PICTURES["views"](None).is_keyframe(PICTURES["views"](None).init_state()) is None


@pytest.mark.parametrize("kind", ["mask", "pixel", "propagated", "distilled"])
def test_a_prior_that_nothing_reads_is_refused(kind):
    stream = SEGMENTORS[kind](None)
    ((frame, _),) = video(kind, [BEFORE])
    with pytest.raises(ValueError, match="no block of the model reads one"):
        stream.step(frame, stream.init_state(), Hints(prior=torch.zeros(1)))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 30))
def test_a_ring_keeps_and_reads_what_counting_back_gives(frames, stride, newest, pushed):
    ring, entries = Ring(frames, stride, newest), []
    for number in range(pushed):
        entries = ring.push(entries, number)
    wanted = [pushed - newest - stride * slot for slot in range(frames)]
    assert ring.read(entries) == [number for number in reversed(wanted) if number >= 0]
    assert len(entries) == min(pushed, max((newest + stride * slot for slot in range(frames)), default=0))
