"""Several streams together: results equal each stream alone; keyframes in batches, in a thread, and spread."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from stream_cases import decoder_threads, source_of
from tolerances import assert_close

import the_mask.modeling  # noqa: F401
from the_mask.config import load_config
from the_mask.inference import StreamingSegmentor
from the_mask.inference.live import batching
from the_mask.inference.live.batching import BackgroundKeyframes, Batcher, Job
from the_mask.inference.live.many_streams import StreamEngine
from the_mask.inference.live.sources import TimedFrame

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "debug"
SIZES = [(64, 96), (48, 64), (64, 96)]


def segmentor(name, *options, **arguments):
    torch.manual_seed(0)
    cfg = load_config(CONFIGS / f"{name}.yaml", ["MODEL.DEVICE", "cpu", *options])
    return StreamingSegmentor(cfg, model=build_model(cfg), **arguments)


def propagated(interval=3, **arguments):
    return segmentor("gsvnet_debug", "MODEL.KEYFRAME.INTERVAL", str(interval), **arguments)


def video(count, size=(64, 96), seed=0):
    """Noise over a moving edge."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 60, (count, *size, 3)).astype(np.uint8)
    for number, frame in enumerate(frames):
        frame[:, : 10 + 3 * number] += 150
    return frames


def one_by_one(stream, frames):
    """Outputs and states of a stream alone."""
    state, outputs, states = stream.init_state(), [], []
    for frame in frames:
        output, state = stream.step(frame, state)
        outputs.append(output)
        states.append(state)
    return outputs, states


def together(batcher, videos):
    """Outputs per stream when all advance at once."""
    states = [batcher.stream.init_state() for _ in videos]
    outputs = [[] for _ in videos]
    for frames in zip(*videos):
        done = batcher.step([Job(str(i), f, s) for i, (f, s) in enumerate(zip(frames, states))])
        states = [result.state for result in done]
        for stream, result in enumerate(done):
            outputs[stream].append(result.output)
    return outputs


@pytest.mark.parametrize(
    ("name", "batches"),
    [("gsvnet_debug", [3, 1, 3, 1]), ("swiftnet_debug", [2, 1] * 5), ("the_mask_debug_video", [1] * 15)],
)
def test_a_batch_gives_what_each_stream_gives_alone(name, batches):
    stream = segmentor(name, output="scores", output_stride=4)
    batcher = Batcher(stream)
    sizes = []
    model = getattr(stream.model, "segmentor", stream.model)
    model.backbone.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    videos = [video(5, size, seed) for seed, size in enumerate(SIZES)]
    for frames, found in zip(videos, together(batcher, videos)):
        expected, _ = one_by_one(stream, frames)
        for right, result in zip(expected, found, strict=True):
            assert_close(result, right, "network")


def test_keyframes_go_in_one_batch_and_the_others_in_another(monkeypatch):
    stream = propagated(3)
    keys, carried = [], []
    stream.model.segmentor.backbone.register_forward_pre_hook(lambda _, x: keys.append(len(x[0])))
    stream.model.propagator.register_forward_pre_hook(lambda _, x: carried.append(len(x[0])))
    together(Batcher(stream), [video(4, seed=i) for i in range(4)])
    assert keys == [4, 4]
    assert carried == [4, 4]


def test_keyframes_of_many_streams_are_spread():
    stream = propagated(3)
    per_tick = {}
    for stagger in (False, True):
        with StreamEngine(stream, stagger=stagger, max_wait=5.0) as engine:
            for i in range(3):
                engine.add(source_of(video(12, seed=i), name=str(i)))
            per_tick[stagger] = [sum(bool(r.keyframe) for r in engine.tick()) for _ in range(12)]
            assert [r.keyframes for r in engine.reports.values()] == ([4, 4, 4] if not stagger else [4, 5, 5])
    assert per_tick[False] == [3, 0, 0] * 4
    assert per_tick[True] == [3] + [1] * 11


def test_the_state_stays_the_segmentors_own():
    """A stream may change between engine and plain steps."""
    stream, frames = propagated(3), video(4)
    batcher = Batcher(stream)
    state = batcher.stream.init_state()
    for frame in frames[:2]:
        state = batcher.step([Job("a", frame, state)])[0].state
    expected, states = one_by_one(stream, frames)
    output, after = stream.step(frames[2], state)
    assert torch.equal(output, expected[2])
    assert after["size"] == states[2]["size"] == [64, 96]
    assert after["views"][0]["since_key"] == states[2]["views"][0]["since_key"] == 2


class LateExecutor:
    """Runs at once, but tells that it is done only after some frames."""

    def __init__(self, delay):
        self.delay = delay
        self.running = []

    def submit(self, function, *arguments):
        executor, result = self, function(*arguments)

        class Future:
            left = executor.delay

            def done(self):
                self.left -= 1
                return self.left < 0

            def result(self):
                return result

            def cancel(self):
                return False

        self.running.append(Future())
        return self.running[-1]

    def shutdown(self, wait, cancel_futures):
        self.running.clear()


def test_a_background_keyframe_takes_over_when_it_is_done():
    """Late by two frames: until then the old keyframe is carried on, from then on the result is as if in time."""
    stream, frames = propagated(4, output="scores"), video(9)
    stream.model.gate = type(stream.model.gate)(float("inf"), max_gap=4)
    batcher = BackgroundKeyframes(stream)
    batcher.executor.shutdown()
    batcher.executor = LateExecutor(1)
    in_time, _ = one_by_one(stream, frames)
    never, state = [], stream.init_state()
    unlimited = propagated(100, output="scores")
    never, _ = one_by_one(unlimited, frames)
    state, found, keys = batcher.stream.init_state(), [], []
    for frame in frames:
        (done,) = batcher.step([Job("a", frame, state)])
        state = done.state
        found.append(done.output)
        keys.append(done.keyframe)
    # Keyframes are due at 0, 4 and 8; the one of 4 is taken over at 6.
    assert keys == [True, False, False, False, False, False, True, False, False]
    for number in (0, 1, 2, 3, 6, 7):
        torch.testing.assert_close(found[number], in_time[number])
    for number in (4, 5):
        torch.testing.assert_close(found[number], never[number])
        assert not torch.allclose(found[number], in_time[number], atol=1e-3)
    batcher.close()


def test_a_keyframe_that_is_too_late_is_waited_for():
    stream, frames = propagated(3), video(8)
    batcher = BackgroundKeyframes(stream)
    batcher.executor.shutdown()
    batcher.executor = LateExecutor(99)
    state, keys = batcher.stream.init_state(), []
    for frame in frames:
        (done,) = batcher.step([Job("a", frame, state)])
        state = done.state
        keys.append(done.keyframe)
        assert all(pending.frames < 3 for pending in batcher.pending.values())
    assert keys == [True, False, False, False, False, False, True, False]
    batcher.close()


def test_asynchronous_streams_end_with_their_thread():
    stream = propagated(2)
    resets = [0.0, 0.1, 0.2, 0.3, 0.0, 0.1, 0.2, 0.3]
    with StreamEngine(stream, asynchronous=True) as engine:
        for i in range(2):
            frames = [TimedFrame(image, seconds) for image, seconds in zip(video(8, seed=i), resets)]
            engine.add(source_of(frames, name=str(i)))
        results = list(engine.results())
    assert len(results) == 16
    for name in "01":
        own = [r for r in results if r.stream == name]
        assert own[0].keyframe
        assert own[4].reset == "seek"
        assert own[4].keyframe
    assert not engine.batcher.pending
    assert decoder_threads() == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_stream_of_a_batch_fails(asynchronous):
    """The other streams give what they give alone, keyframes in the background included."""
    stream = propagated(3, output="scores")
    real = stream.model.output

    def output(state):
        if state["size"] == list(stream.network_size(96, 48)) and state["seen"] == 5:
            raise RuntimeError("scores are broken")
        return real(state)

    stream.model.output = output
    good = [video(9, seed=i) for i in range(2)]
    with StreamEngine(stream, asynchronous=asynchronous, stagger=False, max_wait=5.0) as engine:
        if asynchronous:
            engine.batcher.executor.shutdown()
            engine.batcher.executor = LateExecutor(0)
        for name, frames in zip("abc", [good[0], video(9, (96, 48)), good[1]]):
            engine.add(source_of(frames, name=name))
        found = {name: [] for name in "abc"}
        for result in engine.results():
            found[result.stream].append(result.output)
    assert len(found["b"]) == 4
    assert "scores are broken" in engine.reports["b"].error
    for name, frames in zip("ac", good):
        alone = StreamEngine(stream, asynchronous=asynchronous)
        if asynchronous:
            alone.batcher.executor.shutdown()
            alone.batcher.executor = LateExecutor(0)
        alone.add(source_of(frames))
        for result, expected in zip(found[name], alone.results(), strict=True):
            assert_close(result, expected.output, "network")
        alone.close()


def test_output_strides():
    frames = video(2, (50, 70))
    full, quarter, eighth = (segmentor("swiftnet_debug", output="scores", output_stride=stride) for stride in (1, 4, 8))
    outputs = [one_by_one(stream, frames)[0][1] for stream in (full, quarter, eighth)]
    classes = outputs[0].shape[0]
    assert [tuple(x.shape) for x in outputs] == [(classes, 50, 70), (classes, 13, 18), (classes, 7, 9)]
    labels = one_by_one(segmentor("swiftnet_debug", output_stride=8), frames)[0][1]
    assert torch.equal(labels, outputs[2].argmax(dim=0).to(torch.uint8))
    with pytest.raises(ValueError, match="output_stride is 2; expected one of 1, 4, 8"):
        segmentor("swiftnet_debug", output_stride=2)


def test_batchers_limit():
    assert BackgroundKeyframes(propagated(5)).limit == 5
    stream = segmentor("gsvnet_debug", "MODEL.KEYFRAME.POLICY", "scene_cut")
    batcher = BackgroundKeyframes(stream)
    assert (stream.keyframe_interval, batcher.limit) == (0, batching.MAX_BEHIND)


@pytest.mark.slow
def test_ten_thousand_propagated_frames_keep_a_state_of_constant_size():
    """Also with keyframes in the background; memory in use is flat from the first thousand on."""
    stream = segmentor(
        "gsvnet_debug", "INPUT.TEST.LONG_EDGE", "64", "INPUT.TEST.SHORT_EDGE", "32", "MODEL.KEYFRAME.INTERVAL", "4"
    )
    batcher = BackgroundKeyframes(stream)
    frames = video(8, (32, 64))
    state = batcher.stream.init_state()
    sizes, resident = set(), []
    for number in range(10_000):
        (done,) = batcher.step([Job("a", frames[number % 8], state)])
        state = done.state
        model = state["views"][0]
        sizes.add(sum(model[key].untyped_storage().nbytes() for key in ("scores", "frame", "queries")))
        if number in (1_000, 9_999):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * 4)
    assert model["seen"] == 10_000
    assert len(sizes) == 1
    assert resident[1] - resident[0] < 8192, "KiB"
    batcher.close()
