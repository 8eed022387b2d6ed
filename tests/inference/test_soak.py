"""Ten thousand frames: one stream, and eight of which seven misbehave. Nothing is lost, grows, or stays behind.

A frame carries its number in its pixels, so that order and losses are seen in what comes out. ``SOAK_FRAMES`` makes the
runs longer or shorter.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from stream_cases import CountingStream, decoder_threads, encode, picture

import the_mask.modeling  # noqa: F401  (fills the registries)
from the_mask.config import load_config
from the_mask.inference import StreamingSegmentor
from the_mask.inference.live.many_streams import StreamEngine
from the_mask.inference.live.sources import FrameSource, OnProblem, TimedFrame
from the_mask.modeling.stream import NO_HINTS, Stream

pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "debug"
FRAMES = int(os.environ.get("SOAK_FRAMES", "10000"))
# Caches of memory, of kernels and of sizes are filled by then.
WARM_UP = FRAMES // 4
SIZES = [(32, 48), (48, 32), (32, 32)]
RATE = 25


class Marks(CountingStream):
    """A stream without a model, of constant state."""

    def step(self, frame: Any, state: Any, hints: Any = NO_HINTS) -> Any:
        output, state = super().step(frame, state, hints)
        return output, {**state, "numbers": state["numbers"][-1:]}


def segmentor(name: str) -> Stream:
    """A tiny model."""
    if name == "no model":
        return Marks()
    config = {"propagated": "gsvnet_debug", "encoder-only": "videomt_debug"}[name]
    options = ["MODEL.DEVICE", "cpu", "INPUT.TEST.SHORT_EDGE", "32", "INPUT.TEST.LONG_EDGE", "48"]
    torch.manual_seed(0)
    cfg = load_config(CONFIGS / f"{config}.yaml", options)
    return StreamingSegmentor(cfg, model=build_model(cfg))


MODELS = ["no model", "propagated", "encoder-only"]


def frame(number: int, size: tuple[int, int] = SIZES[0]) -> np.ndarray:
    """A picture with its number in its first pixels."""
    image = np.full((*size, 3), number * 37 % 200, np.uint8)
    image[0, :2] = np.frombuffer(number.to_bytes(6, "big"), np.uint8).reshape(2, 3)
    return image


def number_of(image: np.ndarray) -> int:
    """The number of :func:`frame`."""
    return int.from_bytes(image[0, :2].tobytes(), "big")


def resident() -> int:
    """Memory of this process in bytes, after what is free was given back.

    Without pages of files: the system takes those of libraries back when other processes need memory.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem", "VmSwap"))


def native_threads() -> int:
    """Threads of this process, Python's or not."""
    return len(os.listdir("/proc/self/task"))


class Flatness:
    """Memory over the frames, from the end of the warm-up on."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self._next = WARM_UP

    def look(self, frames: int) -> None:
        """Measure, if it is time."""
        if frames >= self._next:
            self.values.append(resident())
            self._next += FRAMES // 20

    def growth(self) -> float:
        """Mean of the last third over that of the first third, less one."""
        third = len(self.values) // 3
        first, last = self.values[:third], self.values[-third:]
        return sum(last) / sum(first) - 1


# Sources.


def good(start: int, count: int, wait: float = 0.0, every: int = 1) -> Iterator[TimedFrame]:
    """Numbered frames; after some of them it waits."""
    for number in range(start, start + count):
        if wait and number % every == every - 1:
            time.sleep(wait)
        yield TimedFrame(frame(number), number / RATE)


def source(name: str, frames: Iterator[TimedFrame], live: bool = False) -> FrameSource:
    """An open source."""
    return FrameSource(name, frames, Fraction(RATE), None, lambda: None, live)


def stalling(count: int) -> FrameSource:
    """Nothing for a while, again and again."""
    return source("stalling", good(0, count, wait=0.05, every=100))


def dying(count: int) -> Callable[[OnProblem], FrameSource]:
    """A camera that breaks off after some frames, and sometimes cannot be opened."""
    dice, given = random.Random(1), [0]

    def lives() -> Iterator[TimedFrame]:
        for timed in good(given[0], min(count - given[0], dice.randrange(20, 200))):
            given[0] += 1
            yield timed
        if given[0] < count:
            raise OSError("camera: connection lost")

    def connect(on_problem: OnProblem) -> FrameSource:
        if given[0] and (given[0] >= count or dice.random() < 0.2):
            raise FileNotFoundError("camera 0 cannot be opened")
        return source("dying", lives(), live=True)

    return connect


def corrupting(count: int) -> FrameSource:
    """Every seventh frame is none."""
    bad: list[Any] = [None, np.zeros((3, 3), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 4, 3), np.uint8)]

    def frames() -> Iterator[TimedFrame]:
        for timed in good(0, count):
            number = number_of(timed.image)
            yield TimedFrame(bad[number // 7 % 4], timed.seconds) if number % 7 == 6 else timed

    return source("corrupting", frames())


def changing(count: int) -> FrameSource:
    """Another size every so many frames."""
    return source("changing", (TimedFrame(frame(n, SIZES[n // 90 % 3]), n / RATE) for n in range(count)))


def jumping(count: int) -> FrameSource:
    """Times that go back, and far ahead."""
    return source("jumping", (TimedFrame(frame(n), (n % 300) / RATE + 60 * (n % 700 > 600)) for n in range(count)))


def failing(count: int) -> FrameSource:
    """A defect in its code at its end."""

    def frames() -> Iterator[TimedFrame]:
        yield from good(0, count)
        raise ZeroDivisionError("a defect")

    return source("failing", frames())


def expected(name: str, count: int) -> list[int]:
    """Numbers that have to come out of a source."""
    return [n for n in range(count) if name != "corrupting" or n % 7 != 6]


@pytest.mark.parametrize("model", MODELS)
def test_one_stream(model: str, record_property: Callable[[str, object], None]) -> None:
    stream, flat, order = segmentor(model), Flatness(), 0
    threads = native_threads()
    with StreamEngine(stream) as engine:
        engine.add(source("one", good(0, FRAMES)))
        for result in engine.results():
            assert number_of(result.frame.image) == result.number == order
            assert result.output.shape[-2:] == SIZES[0]
            order += 1
            flat.look(order)
            threads = native_threads() if order == WARM_UP else threads
        assert native_threads() == threads - 1, "only the decoder's thread has ended"
    assert order == FRAMES
    assert decoder_threads() == []
    record_property("growth", f"{flat.growth():+.3%}")
    assert abs(flat.growth()) < 0.01, [value >> 20 for value in flat.values]


@pytest.mark.parametrize("model", MODELS)
def test_eight_streams(model: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Two good ones (one is files), the others stall, break off, are corrupt, change size, jump and have a defect."""
    count = FRAMES // 8
    stream, flat = segmentor(model), Flatness()
    for number in range(20):
        Image.fromarray(frame(number)).save(tmp_path / f"{number}.png")
    for number in (3, 11):
        data = (tmp_path / f"{number}.png").read_bytes()
        (tmp_path / f"{number}.png").write_bytes(data[: len(data) // 2])
    video = tmp_path / "v.mp4"
    video.write_bytes(encode([picture(i, SIZES[0]) for i in range(25)], gop=5))
    python_threads = threading.active_count()
    total, seen, folders, videos = 0, {}, 0, 0
    with StreamEngine(stream, max_wait=0.01) as engine:
        for maker in (stalling, corrupting, changing, jumping, failing):
            engine.add(maker(count), name=maker.__name__)
        engine.add(dying(count), name="dying", mode="all", reconnects=1000, reconnect_wait=0.001)
        engine.add(source("good", good(0, count)), name="good")
        engine.add(tmp_path, name="folder 0")
        lasting = list(engine.reports)[:-1]
        while total < 8 * count or not all(engine.reports[name].ended for name in lasting):
            for result in engine.tick():
                total += 1
                flat.look(total)
                numbers = seen.setdefault(result.stream, [])
                if not result.stream.startswith("video"):
                    numbers.append(number_of(result.frame.image))
                assert result.output.shape[-2:] == result.frame.image.shape[:2]
            # The eighth place is taken by folders and videos in turn, opened and closed again and again.
            for name in [n for n in engine.reports if n.startswith(("folder", "video")) and engine.reports[n].ended]:
                report = engine.reports.pop(name)
                if name.startswith("folder"):
                    assert seen.pop(name) == [n for n in range(20) if n not in (3, 11)]
                    assert report.counts["damaged"] == 2
                    folders += 1
                    engine.add(video, name=f"video {folders}")
                else:
                    assert report.frames == 25
                    seen.pop(name)
                    videos += 1
                    engine.add(tmp_path, name=f"folder {folders}")
        reports = dict(engine.reports)
    for name, numbers in seen.items():
        if not name.startswith(("folder", "video")):
            assert numbers == expected(name, count), name
    assert reports["failing"].error == "ZeroDivisionError: a defect"
    assert reports["dying"].counts["lost"] > count / 200
    assert reports["corrupting"].counts["damaged"] == count // 7
    assert reports["changing"].resets["resolution"] == (count - 1) // 90
    assert reports["jumping"].resets["seek"] >= (count - 1) // 300
    assert folders >= count // 300
    assert videos >= count // 300
    assert decoder_threads() == []
    assert threading.active_count() == python_threads
    record_property("growth", f"{flat.growth():+.3%}")
    assert abs(flat.growth()) < 0.01, [value >> 20 for value in flat.values]
