"""The streaming engine: back-pressure, rules for bad sources, threads, and results independent of other streams."""

import gc
import os
import re
import resource
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from stream_cases import (
    CountingStream,
    decoder_threads,
    encode,
    number_of,
    picture,
    source_of,
    timed,
    write_video,
)

from the_mask.inference.live import reader
from the_mask.inference.live.many_streams import StreamEngine
from the_mask.inference.live.sources import FrameSource, TimedFrame
from the_mask.modeling.stream import NO_HINTS, Stream


@pytest.fixture(autouse=True)
def no_threads_are_left():
    yield
    assert decoder_threads() == []


def run(source, **options):
    """Results and report of one stream."""
    with StreamEngine(CountingStream()) as engine:
        name = engine.add(source, **options)
        results = list(engine.results())
    return results, engine.reports[name]


def test_every_frame_of_a_file_and_a_folder(tmp_path):
    video = write_video(tmp_path / "v.mp4", 12)
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(5):
        Image.fromarray(picture(number)).save(folder / f"{number}.png")
    with StreamEngine(CountingStream()) as engine:
        names = [engine.add(video), engine.add(folder), engine.add(video)]
        found = {name: [] for name in names}
        for result in engine.results():
            assert number_of(result.frame.image) == number_of(result.output)
            assert result.number == len(found[result.stream])
            assert result.latency > 0
            assert result.keyframe is None
            found[result.stream].append(number_of(result.frame.image))
    assert names == [str(video), str(folder), f"{video} #2"]
    assert list(found.values()) == [list(range(12)), list(range(5)), list(range(12))]
    for name, count in zip(names, (12, 5, 12)):
        report = engine.reports[name]
        assert (report.decoded, report.frames, report.dropped, report.error, report.ended) == (
            count,
            count,
            0,
            None,
            True,
        )
        assert not report.counts
        assert not report.resets


def test_all_waits_for_a_slow_model():
    """The decoder runs at most a queue ahead, and no frame is lost."""
    given = []

    def frames():
        for frame in timed([i / 10 for i in range(30)]):
            given.append(frame)
            yield frame

    with StreamEngine(CountingStream()) as engine:
        engine.add(source_of(frames()), queue_size=3)
        for count, result in enumerate(engine.results()):
            time.sleep(0.002)
            assert result.number == count
            assert len(given) <= count + 1 + 3 + 1, "in the model, in the queue, in the decoder's hand"
    assert count == 29
    assert engine.reports["test"].dropped == 0


def test_latest_gives_the_newest_frame_and_counts_the_others():
    gate = threading.Semaphore(0)
    waiting = threading.Event()

    def frames():
        for frame in timed([i / 10 for i in range(20)]):
            if not gate.acquire(blocking=False):
                waiting.set()
                gate.acquire()
            yield frame

    def release(count):
        waiting.clear()
        for _ in range(count):
            gate.release()
        assert waiting.wait(5)

    with StreamEngine(CountingStream()) as engine:
        engine.add(source_of(frames(), live=True))
        report = engine.reports["test"]
        assert engine.tick(0.01) == []
        release(1)
        assert [number_of(r.frame.image) for r in engine.tick()] == [0]
        release(6)
        assert [number_of(r.frame.image) for r in engine.tick()] == [6]
        assert report.dropped == 5
        gate.release(13)
        rest = [number_of(r.frame.image) for r in engine.results()]
        assert rest[-1] == 19
    assert report.frames + report.dropped == report.decoded == 20


def test_realtime_plays_a_file_at_its_own_speed(tmp_path):
    video = write_video(tmp_path / "v.mp4", 5, rate=20)
    start = time.perf_counter()
    results, report = run(video, realtime=True)
    assert time.perf_counter() - start >= 4 / 20
    assert len(results) == 5
    assert report.dropped == 0


def test_timestamps_that_go_back_or_jump_make_the_state_anew():
    results, report = run(source_of(timed([0, 0.1, 0.1, 0.4, 0.2, 0.3, 5.0, 5.1])))
    assert [r.reset for r in results] == ["", "", "", "", "seek", "", "gap", ""]
    assert dict(report.resets) == dict(report.counts) == {"seek": 1, "gap": 1}
    assert [(e.kind, e.frame) for e in report.events] == [("seek", 4), ("gap", 6)]
    assert report.events[0].message == "timestamps go back from 0.400 s to 0.200 s"


class Remembering(CountingStream):
    """Keeps every state it was given."""

    def __init__(self):
        self.states = []

    def step(self, frame, state, hints=NO_HINTS):
        self.states.append(state["numbers"])
        return super().step(frame, state)


def test_a_reset_is_a_new_state():
    runner = Remembering()
    frames = [*timed([0, 0.1, 0.2]), TimedFrame(picture(3, (12, 8)), 0.3), TimedFrame(picture(4, (12, 8)), 0.0)]
    with StreamEngine(runner) as engine:
        engine.add(source_of(frames))
        resets = [r.reset for r in engine.results()]
    assert runner.states == [[], [0], [0, 1], [], []]
    assert resets == ["", "", "", "resolution", "seek"]
    assert engine.reports["test"].events[0].message == "frames change from 8x12 to 12x8 pixels"


def test_resolution_change_of_a_real_video(tmp_path):
    path = tmp_path / "two.ts"
    first = encode([picture(i) for i in range(4)], kind="mpegts")
    second = encode([picture(i, (96, 64)) for i in range(3)], [1 + i / 10 for i in range(3)], kind="mpegts")
    path.write_bytes(first + second)
    results, report = run(path)
    assert [r.output.shape for r in results] == [(48, 64)] * 4 + [(96, 64)] * 3
    assert sum(report.resets.values()) == 1
    assert report.error is None


def test_variable_rate_is_no_reason_to_reset(tmp_path):
    times = [0, 0.1, 0.15, 0.9, 1.0, 2.9, 3.0]
    path = tmp_path / "vfr.mkv"
    path.write_bytes(encode([picture(i) for i in range(7)], times, kind="matroska"))
    results, report = run(path)
    assert [r.frame.seconds for r in results] == pytest.approx(times, abs=2e-3)
    assert not report.counts


def test_damage_is_an_event_and_the_stream_goes_on(tmp_path):
    for number in range(6):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"rubbish")
    (tmp_path / "3.png").write_bytes(b"")
    results, report = run(tmp_path)
    assert [number_of(r.frame.image) for r in results] == [0, 1, 4, 5]
    assert dict(report.counts) == {"damaged": 2}
    assert "2.png" in report.events[0].message
    assert not report.resets
    assert (report.error, report.dropped) == (None, 0)


def test_a_source_that_breaks_off_ends_its_stream_only():
    def broken():
        yield from timed([0, 0.1])
        raise ValueError("video broken.mp4 cannot be read after frame 2")

    with StreamEngine(CountingStream()) as engine:
        engine.add(source_of(broken(), name="broken"))
        engine.add(source_of(timed([i / 10 for i in range(6)]), name="whole"))
        results = [r.stream for r in engine.results()]
    assert (results.count("broken"), results.count("whole")) == (2, 6)
    report = engine.reports["broken"]
    assert (report.error, report.ended) == ("video broken.mp4 cannot be read after frame 2", True)
    assert dict(report.counts) == {"lost": 1}
    assert engine.reports["whole"].error is None


def test_zero_length_and_missing_files_are_errors_at_once(tmp_path):
    (tmp_path / "empty.mp4").touch()
    with StreamEngine(CountingStream()) as engine:
        with pytest.raises(ValueError, match=r"empty\.mp4 is empty \(0 bytes\)"):
            engine.add(tmp_path / "empty.mp4")
        with pytest.raises(FileNotFoundError, match="nowhere"):
            engine.add(tmp_path / "nowhere.mp4")
        assert list(engine.results()) == []
        assert engine.reports == {}


class Camera:
    """Goes away after each of ``lengths`` frames; opening it again fails ``away`` times, and always after the last."""

    def __init__(self, lengths, away=0):
        self.lengths, self.away, self.closed, self.failed = list(lengths), away, [], 0

    def __call__(self, on_problem):
        if (self.away and self.closed) or not self.lengths:
            self.away, self.failed = max(0, self.away - 1), self.failed + 1
            raise FileNotFoundError("camera 0 cannot be opened")
        frames = timed([i / 10 for i in range(self.lengths.pop(0))])
        return source_of(frames, live=True, name="camera 0", closed=self.closed)


def test_camera_gone():
    camera = Camera([3])
    results, report = run(camera, name="camera", mode="all")
    assert len(results) == 3
    assert camera.closed == [True]
    assert (report.error, report.ended) == (None, True)
    assert [(e.kind, e.message) for e in report.events] == [("lost", "camera 0 gives no more frames")]


def test_camera_that_comes_back():
    camera = Camera([3, 2, 2], away=2)
    results, report = run(camera, name="camera", mode="all", reconnects=3, reconnect_wait=0.0)
    assert [r.reset for r in results] == ["", "", "", "reconnected", "", "reconnected", ""]
    assert report.counts["reconnected"] == report.resets["reconnected"] == 2
    assert len(camera.closed) == 3
    assert camera.failed == 2 + 3, "three attempts, then the end"
    assert report.ended


def test_a_local_file_that_breaks_is_not_opened_again():
    opened = []

    def broken():
        yield from timed([0, 0.1])
        raise ValueError("broken")

    def again(on_problem):
        opened.append(True)
        return source_of(broken())

    results, report = run(again, name="file", reconnects=5, reconnect_wait=0.0)
    assert (len(opened), len(results), report.error) == (1, 2, "broken")


def test_seek(tmp_path):
    video = write_video(tmp_path / "v.mp4", 30, gop=5)
    with StreamEngine(CountingStream()) as engine:
        name = engine.add(video)
        numbers, resets = [], []
        for result in engine.results():
            numbers.append(number_of(result.frame.image))
            resets.append(result.reset)
            if len(numbers) == 10:
                engine.seek(name, 0.3)
        with pytest.raises(ValueError, match="no running stream"):
            engine.seek(name, 0)
    assert numbers[:10] == list(range(10))
    back = resets.index("seek")
    # A frame in the decoder's hand may still come.
    assert back in (10, 11)
    assert numbers[back:] == list(range(3, 30))


def test_closing_ends_waiting_decoders(tmp_path):
    video = write_video(tmp_path / "v.mp4", 30)
    closed = []
    with StreamEngine(CountingStream()) as engine:
        engine.add(video, queue_size=1)
        engine.add(source_of(timed([i / 10 for i in range(30)]), closed=closed))
        engine.tick()
        assert len(decoder_threads()) == 2
    assert decoder_threads() == []
    assert closed == [True]
    assert all(report.ended for report in engine.reports.values())
    report = engine.reports["test"]
    assert report.decoded == report.frames + report.dropped


def test_leaving_by_an_error_ends_threads_too(tmp_path):
    video = write_video(tmp_path / "v.mp4", 30)
    with pytest.raises(KeyboardInterrupt), StreamEngine(CountingStream()) as engine:  # noqa: PT012
        engine.add(video)
        for _ in engine.results():
            raise KeyboardInterrupt
    assert decoder_threads() == []


def eight_streams(engine, bad, length=6, closed=None):
    """Results by stream of seven good sources and ``bad``, all in one engine."""
    names = [engine.add(bad, name="bad") if i == 3 else engine.add(source_of(timed_frames(length))) for i in range(8)]
    found = {name: [] for name in names}
    for result in engine.results():
        found[result.stream].append(number_of(result.frame.image))
    for name in found:
        if name != "bad":
            assert found[name] == list(range(length)), name
            assert engine.reports[name].error is None
            assert not engine.reports[name].counts
    return found["bad"], engine.reports["bad"]


def timed_frames(length):
    return timed([i / 10 for i in range(length)])


def test_a_defect_in_a_source_ends_its_stream_only(caplog):
    def frames():
        yield from timed([0])
        raise ZeroDivisionError("a defect")

    with StreamEngine(CountingStream()) as engine:
        numbers, report = eight_streams(engine, source_of(frames()))
    assert numbers == [0]
    assert (report.error, report.ended, dict(report.counts)) == ("ZeroDivisionError: a defect", True, {"lost": 1})
    assert "a defect in its source" in caplog.text
    assert 'raise ZeroDivisionError("a defect")' in caplog.text, "with the place"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 12, 3), np.float32), r"uint8 RGB \[H, W, 3\], got float32 \[8, 12, 3\]"),
        (np.zeros((8, 12), np.uint8), r"got uint8 \[8, 12\]"),
        (np.zeros((8, 12, 4), np.uint8), r"got uint8 \[8, 12, 4\]"),
        (np.zeros((0, 12, 3), np.uint8), r"got uint8 \[0, 12, 3\]"),
        (Image.new("RGB", (12, 8)), "got Image"),
        (None, "got NoneType"),
    ],
)
def test_a_bad_array_is_skipped_and_named(image, message):
    """Every other frame of the source is segmented, and so is every frame of the other streams."""
    frames = timed_frames(6)
    frames[2] = TimedFrame(image, 0.2)
    with StreamEngine(CountingStream()) as engine:
        numbers, report = eight_streams(engine, source_of(frames, name="camera"))
    assert numbers == [0, 1, 3, 4, 5]
    assert (report.decoded, report.frames, report.dropped, report.error) == (5, 5, 0, None)
    assert dict(report.counts) == {"damaged": 1}
    assert re.search("camera: a frame at 0.200 s is skipped: a frame is " + ".*" + message, report.events[0].message)


def test_damaged_pictures_of_a_folder_are_skipped_and_named(tmp_path):
    for number in range(8):
        Image.fromarray(picture(number, (8, 12))).save(tmp_path / f"{number}.png")
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "3.png").write_bytes(whole[:20] + bytes(20) + whole[40:])
    (tmp_path / "5.png").unlink()
    (tmp_path / "5.png").symlink_to(tmp_path / "nowhere.png")
    with StreamEngine(CountingStream()) as engine:
        numbers, report = eight_streams(engine, tmp_path)
    assert numbers == [0, 2, 4, 6, 7]
    assert dict(report.counts) == {"damaged": 3}
    assert [event.message.split("/")[-1][:5] for event in report.events] == ["1.png", "3.png", "5.png"]
    assert report.error is None


class Picky(CountingStream):
    """Fails on frames of one number and height; counts its calls."""

    def __init__(self, number=2, height=9, kind=RuntimeError):
        self.number, self.height, self.kind, self.calls = number, height, kind, 0

    def step(self, frame, state, hints=NO_HINTS):
        self.calls += 1
        if number_of(frame) == self.number and frame.shape[0] == self.height:
            raise self.kind("kernel size can't be greater than actual input size")
        return super().step(frame, state)


def failing_source(length=6):
    return source_of([TimedFrame(picture(i, (9, 12)), i / 10) for i in range(length)])


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, KeyError])
def test_a_frame_that_the_model_fails_on_ends_its_stream_only(kind, caplog):
    with StreamEngine(Picky(kind=kind), max_wait=5.0) as engine:
        numbers, report = eight_streams(engine, failing_source())
    assert numbers == [0, 1]
    assert report.error.startswith(f"frame 2 cannot be segmented: {kind.__name__}: ")
    assert (report.ended, report.frames, report.decoded, dict(report.counts)) == (True, 2, 2, {"failed": 1})
    assert "Traceback" in caplog.text


def test_the_models_error_is_raised_when_no_stream_is_left():
    with StreamEngine(Picky()) as engine:
        engine.add(failing_source(), name="only")
        found = [number_of(engine.tick()[0].frame.image) for _ in range(2)]
        with pytest.raises(RuntimeError, match="kernel size"):
            engine.tick()
        assert found == [0, 1]
        assert "kernel size" in engine.reports["only"].error
        assert list(engine.results()) == []


def test_a_decoder_that_hangs_is_named(monkeypatch):
    monkeypatch.setattr(reader, "JOIN_TIMEOUT", 0.05)
    hang = threading.Event()

    def frames():
        yield from timed([0])
        hang.wait()

    engine = StreamEngine(CountingStream())
    engine.add(source_of(frames()))
    engine.tick()
    with pytest.raises(RuntimeError, match="test: the decoder does not return"):
        engine.close()
    hang.set()
    while decoder_threads():
        time.sleep(0.01)


def test_batches_take_turns():
    """More streams than a batch takes: all advance alike."""
    with StreamEngine(CountingStream(), max_batch=2, max_wait=1.0) as engine:
        for _ in range(5):
            engine.add(source_of(timed([i / 10 for i in range(8)])))
        counts = dict.fromkeys(engine.reports, 0)
        for _ in range(15):
            for result in engine.tick():
                counts[result.stream] += 1
            assert max(counts.values()) - min(counts.values()) <= 1
        assert sum(counts.values()) == 30


def test_waiting_fills_batches():
    """Streams whose frames come at different moments share a tick when it may wait for them."""

    def slow():
        for frame in timed([i / 10 for i in range(4)]):
            time.sleep(0.03)
            yield frame

    sizes = {}
    for wait in (0.0, 5.0):
        with StreamEngine(CountingStream(), max_wait=wait) as engine:
            engine.add(source_of(slow(), name="slow"))
            engine.add(source_of(timed([i / 10 for i in range(4)]), name="fast"))
            sizes[wait] = [len(engine.tick()) for _ in range(4)]
    assert sizes[5.0] == [2, 2, 2, 2]
    assert sizes[0.0] != sizes[5.0]


def test_bad_arguments():
    for options in ({"max_batch": 0}, {"max_wait": -1.0}, {"max_gap": 0.0}, {"max_gap": float("nan")}):
        with pytest.raises(ValueError, match=r"expected at least 1, 0 or more, above 0"):
            StreamEngine(CountingStream(), **options)
    with pytest.raises(ValueError, match="asynchronous keyframes need a PropagatedSegmentor"):
        StreamEngine(CountingStream(), asynchronous=True)
    with StreamEngine(CountingStream()) as engine:
        with pytest.raises(ValueError, match="mode 'newest': expected one of all, latest"):
            engine.add(source_of([]), mode="newest")
        with pytest.raises(ValueError, match="queue_size 0"):
            engine.add(source_of([]), queue_size=0)
        engine.add(source_of(timed([0])), name="one")
        with pytest.raises(ValueError, match="there is a stream 'one' already"):
            engine.add(source_of([]), name="one")
        with pytest.raises(ValueError, match="no running stream 'two'; running: one"):
            engine.remove("two")
        with pytest.raises(ValueError, match="seek to -1 s"):
            engine.seek("one", -1)


def test_warm_up():
    class Sizes(CountingStream):
        shapes = []  # noqa: RUF012

        def step(self, frame, state, hints=NO_HINTS):
            self.shapes.append((frame.shape, len(state["numbers"])))
            return super().step(frame, state)

    engine = StreamEngine(Sizes())
    assert not engine.ready
    engine = StreamEngine(Sizes(), warm_up=[(4, 6), (8, 8)])
    assert engine.ready
    assert Sizes.shapes == [((4, 6, 3), 0), ((4, 6, 3), 1), ((8, 8, 3), 0), ((8, 8, 3), 1)]
    engine.close()


def test_reports_are_of_constant_size():
    results, report = run(source_of(timed([i % 2 for i in range(600)])))
    assert len(results) == 600
    assert report.counts["seek"] == 299
    assert len(report.events) == reader.EVENTS_KEPT


class LastFrame(Stream):
    """State: the last frame; output: where the frame differs from it."""

    def init_state(self):
        return self.new_state(frame=None)

    def step(self, frame, state, hints=NO_HINTS):
        last = frame if state["frame"] is None else state["frame"]
        return torch.from_numpy((frame != last).any(axis=2)), {**state, "frame": frame}


def count_native_threads():
    return len(os.listdir("/proc/self/task"))


@pytest.mark.slow
def test_ten_thousand_frames(tmp_path):
    """Ten thousand frames of two streams, with 200 sources opened and closed: memory flat, no thread left."""
    video = write_video(tmp_path / "v.mp4", 50, gop=10)
    peaks, threads, objects = [], [], []
    before = count_native_threads()
    with StreamEngine(LastFrame()) as engine:
        total = 0
        while total < 10_000:
            engine.add(video)
            engine.add(FrameSource("live", iter(timed([i / 10 for i in range(50)], (48, 64))), 10, None, lambda: 0))
            total += sum(1 for _ in engine.results())
            # Reports are the caller's to keep or to drop.
            engine.reports.clear()
            if total in (2000, 10_000):
                gc.collect()
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
                threads.append(count_native_threads())
                objects.append(len(gc.get_objects()))
    assert total == 10_000
    assert peaks[1] - peaks[0] <= 4096, "KiB"
    assert threads[1] == threads[0] <= before + 1
    assert objects[1] - objects[0] < 200
    assert decoder_threads() == []
