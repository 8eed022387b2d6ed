"""Time of each stage of a video's processing, from the input file to the annotated file.

Frames are processed one after the other in one thread, and every stage is timed separately. Decoder and encoder have
their own threads: their wall time is how long this thread waits, their processor time includes those threads.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from the_mask.data.classes import distinct_colors
from the_mask.inference.demo import DemoStyle, FrameAnnotator
from the_mask.inference.live.sources import open_source
from the_mask.inference.rendering.render import Palette
from the_mask.inference.rendering.video_writer import VideoWriter
from the_mask.inference.stream import StreamingSegmentor
from the_mask.modeling.propagation.propagated import PropagatedSegmentor
from the_mask.modeling.segmentor import Segmentor

# decode: file to RGB; resize: to the network's size; normalise: uint8 to floats on the device, and the small frames of
# keyframe models; network: scores; labels: scores to the label map of the frame; overlay: colours and legend; encode.
STAGES = ("decode", "resize", "normalise", "network", "labels", "overlay", "encode")
Seconds = dict[str, list[float]]


def stage_seconds(
    segmentor: StreamingSegmentor, source: str | Path, folder: str | Path, count: int, warm_up: int
) -> tuple[Seconds, Seconds]:
    """Run a video's whole path and clock its stages.

    Args:
        segmentor: runs; its output is labels.
        source: video file or folder; it starts again when it ends.
        folder: where the annotated video is written.
        count: frames measured.
        warm_up: frames before, not measured.

    Returns:
        Seconds of each stage for each frame: by the wall clock, and of the process on all cores.
    """
    model = segmentor.model
    clock = _Clock(model.device)
    names = [f"class {i}" for i in range(model.num_classes)]
    palette = Palette(names, distinct_colors(len(names)), model.ignore_label)
    wall: Seconds = {stage: [] for stage in STAGES}
    processor: Seconds = {stage: [] for stage in STAGES}
    annotator = FrameAnnotator(palette, DemoStyle(), 25)
    state = model.init_state()
    frames = _endless(source, clock)
    with _clocked(_normalisers(model), clock), VideoWriter(Path(folder) / "annotated.mp4", 25) as writer:
        for number in range(warm_up + count):
            clock.reset()
            frame = next(frames)
            with clock("resize"):
                pixels = segmentor.prepare(frame)
            with clock("network"):
                scores, state = model.step(pixels, state)
            with clock("labels"):
                labels = segmentor.finish(scores, (pixels.shape[1], pixels.shape[2]), frame.shape[:2])
            with clock("overlay"):
                drawn = annotator.draw(frame, np.asarray(labels))
            with clock("encode"):
                writer.write(drawn)
            if number >= warm_up:
                for table, column in ((wall, 0), (processor, 1)):
                    for stage in STAGES:
                        table[stage].append(clock.spent[stage][column])
    frames.close()
    return wall, processor


class _Clock:
    """Adds up the seconds of named spans; those of an inner span do not count for the outer one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent: dict[str, np.ndarray] = {}
        self._inner = np.zeros(2)

    def reset(self) -> None:
        self.spent = {stage: np.zeros(2) for stage in STAGES}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        outer, self._inner = self._inner, np.zeros(2)
        start = self._now()
        try:
            yield
        finally:
            whole = self._now() - start
            self.spent[stage] += whole - self._inner
            self._inner = outer + whole

    def _now(self) -> np.ndarray:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return np.array([time.perf_counter(), time.process_time()])


def _endless(source: str | Path, clock: _Clock) -> Any:
    while True:
        with open_source(source) as opened:
            frames = iter(opened)
            while True:
                with clock("decode"):
                    frame = next(frames, None)
                if frame is None:
                    break
                yield frame


def _normalisers(model: Any) -> list[tuple[Any, str]]:
    """Methods that make the networks' inputs of uint8 pixels."""
    found: list[tuple[Any, str]] = [(module, "stack") for module in model.modules() if isinstance(module, Segmentor)]
    if isinstance(model, PropagatedSegmentor):
        found.append((model, "small_frames"))
    return found


@contextlib.contextmanager
def _clocked(methods: list[tuple[Any, str]], clock: _Clock) -> Iterator[None]:
    """Inside the block calls of these methods are clocked as "normalise"."""

    def with_clock(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with clock("normalise"):
                return method(*args, **kwargs)

        return call

    for owner, name in methods:
        object.__setattr__(owner, name, with_clock(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in methods:
            object.__delattr__(owner, name)
