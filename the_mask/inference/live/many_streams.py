"""Streaming engine: any number of files, folders, cameras and URLs through one model.

Each source is decoded in its own thread into a bounded queue. Each tick takes at most one frame of every stream and
segments them together. A stream's state has constant size.

A stream is reset, so that its next frame is a keyframe, when frames change size ("resolution"), when timestamps go back
("seek") or jump ahead by more than ``max_gap`` ("gap"), and after a reconnection. The state is kept across damaged
parts that leave no such gap. Every case is an event in the stream's report. A frame that is not a picture is skipped; a
defect of a source, or a frame on which the model fails, ends only that stream.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from the_mask.inference.live.batching import BackgroundKeyframes, Batcher, Done, Job
from the_mask.inference.live.reader import Arrival, OpenSource, StreamReader, StreamReport
from the_mask.inference.live.sources import FrameSource, OnProblem, TimedFrame, open_source
from the_mask.modeling.stream import Hints, Stream, StreamState

logger = logging.getLogger(__name__)
Source = str | Path | int | FrameSource | OpenSource


class StreamResult(NamedTuple):
    """A segmented frame.

    Attributes:
        stream: its name.
        number: number of frames of this stream segmented before.
        frame: image and time.
        output: labels or scores, as returned by the engine's stream.
        keyframe: whether a new keyframe was used; None if the model has none.
        reset: why the state was reset before this frame; "" if it was not.
        latency: seconds from decoded to segmented.
    """

    stream: str
    number: int
    frame: TimedFrame
    output: Tensor
    keyframe: bool | None
    reset: str
    latency: float


@dataclass
class _Stream:
    """A stream's reader, report and model state, and the last frame's data for the reset rules."""

    reader: StreamReader
    report: StreamReport
    state: StreamState
    phase: int
    since_reset: int = 0
    seconds: float | None = None
    size: tuple[int, ...] = ()


class StreamEngine:
    """Segments streams as fast as their sources and the model allow::

        with StreamEngine(StreamingSegmentor(cfg)) as engine:
            engine.add("drive.mp4")
            engine.add(0, mode="latest")
            for result in engine.results():
                show(result.frame.image, result.output)

    Attributes:
        reports: a :class:`StreamReport` per stream, kept after its end.
        ready: whether :meth:`warm_up` was done.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        max_batch: int = 8,
        max_wait: float = 0.0,
        max_gap: float = 2.0,
        stagger: bool = True,
        asynchronous: bool = False,
        warm_up: Sequence[tuple[int, int]] = (),
    ) -> None:
        """
        Args:
            stream: a ``StreamingSegmentor`` or any other :class:`~the_mask.modeling.stream.Stream` of pictures.
            max_batch: largest number of streams that are advanced together.
            max_wait: seconds that frames wait for those of other streams to share a batch.
            max_gap: seconds between timestamps above which a stream is reset; at least two frames, for sources with
                less than one frame per second.
            stagger: spread the keyframes of many streams over the policy's interval.
            asynchronous: compute keyframes in a background thread; see :class:`BackgroundKeyframes`.
            warm_up: (height, width) of frames to expect; see :meth:`warm_up`.

        Raises:
            ValueError: values outside their range, or ``asynchronous`` without keyframes.
        """
        if max_batch < 1 or not max_wait >= 0 or not max_gap > 0:
            raise ValueError(
                f"max_batch {max_batch}, max_wait {max_wait} s, max_gap {max_gap} s: expected at least 1, 0 or more, "
                "above 0"
            )
        self.stream = stream
        self.batcher = BackgroundKeyframes(stream) if asynchronous else Batcher(stream)
        self.max_batch, self.max_wait, self.max_gap, self.stagger = max_batch, max_wait, max_gap, stagger
        self.reports: dict[str, StreamReport] = {}
        self.ready = False
        self._streams: dict[str, _Stream] = {}
        self._wake = threading.Condition()
        self._turn = 0
        self._added = 0
        if warm_up:
            self.warm_up(warm_up)

    def warm_up(self, sizes: Sequence[tuple[int, int]], frames: int = 2) -> None:
        """Segment black frames, so that the first real ones are not slow; the first is a keyframe, the others not."""
        for height, width in sizes:
            state = self.stream.init_state()
            for _ in range(frames):
                image = np.zeros((height, width, 3), dtype=np.uint8)
                state = self.batcher.step([Job("warm up", image, state)])[0].state
            self.batcher.forget("warm up")
        self.ready = True

    def add(
        self,
        source: Source,
        name: str | None = None,
        *,
        mode: str | None = None,
        queue_size: int | None = None,
        fps: float | Fraction | None = None,
        realtime: bool = False,
        reconnects: int = 0,
        reconnect_wait: float = 1.0,
    ) -> str:
        """Open a source and start decoding it.

        Args:
            source: path, folder, URL or camera index; an open :class:`FrameSource`; or a function that opens one.
            name: default: its path, made unique.
            mode: "all" segments every frame; "latest" drops waiting frames when a newer one comes, and counts them.
                Default: "latest" for live sources (cameras, rtsp, ...), else "all".
            queue_size: largest number of waiting frames; default 4, or 1 in mode "latest".
            fps: see :func:`open_source`.
            realtime: play a file at its own speed, as a camera would.
            reconnects: how often in a row a camera or URL that breaks off is opened again.
            reconnect_wait: seconds before each attempt.

        Returns:
            The stream's name.

        Raises:
            FileNotFoundError: no such source.
            ValueError: a source that cannot be opened or is empty, a name in use, or values outside their range.
        """
        wanted = name or (source.name if isinstance(source, FrameSource) else str(source))
        if name is not None and name in self.reports:
            raise ValueError(f"there is a stream {name!r} already")
        number = 1
        while (unique := wanted if number == 1 else f"{wanted} #{number}") in self.reports:
            number += 1
        report = StreamReport(unique)
        reader = StreamReader(
            _opener(source, fps), report, self._wake, mode, queue_size, realtime, reconnects, reconnect_wait
        )
        self.reports[unique] = report
        # Offset each stream by one more frame, so that the keyframes are spread evenly over the ticks.
        phase = self._added % self.stream.keyframe_interval if self.stagger and self.stream.keyframe_interval else 0
        self._added += 1
        self._streams[unique] = _Stream(reader, report, self.stream.init_state(), phase)
        return unique

    def fps(self, name: str) -> Fraction:
        """Frames per second of a running stream's source."""
        return self._stream(name).reader.fps

    def seek(self, name: str, seconds: float) -> None:
        """Continue with the frame shown at this time. Going back, or ahead by more than ``max_gap``, resets the state.

        Raises:
            ValueError: no such stream, a negative time, or a live source.
        """
        reader = self._stream(name).reader
        if reader.live or not seconds >= 0:
            raise ValueError(f"stream {name}: seek to {seconds} s; expected 0 or more, in a file or folder")
        reader.seek(seconds)

    def remove(self, name: str) -> StreamReport:
        """Stop a stream and end its thread.

        Raises:
            ValueError: no such stream.
            RuntimeError: its decoder hangs.
        """
        stream = self._stream(name)
        del self._streams[name]
        self.batcher.forget(name)
        stream.reader.close()
        stream.report.ended = True
        return stream.report

    def results(self) -> Iterator[StreamResult]:
        """Segmented frames until every stream has ended (with a live one: forever)."""
        while self._streams:
            yield from self.tick()

    def tick(self, timeout: float | None = None) -> list[StreamResult]:
        """Segment one frame of every stream that has one waiting, at most ``max_batch``.

        Args:
            timeout: seconds to wait for a first frame; None waits until there is one or every stream has ended.

        Raises:
            Exception: an error of the model that leaves no stream running. An error in one stream, or in its source,
                ends only that stream and is in its report.
        """
        taken = self._collect(timeout)
        jobs, resets = [], []
        for stream, arrival in taken:
            resets.append(self._apply_rules(stream, arrival))
            request = stream.phase > 0 and stream.since_reset == stream.phase
            jobs.append(Job(stream.report.name, arrival.frame.image, stream.state, Hints(keyframe=request)))
        done = self._segment(jobs)
        now = time.perf_counter()
        results, failed = [], []
        for (stream, arrival), outcome, reset in zip(taken, done, resets, strict=True):
            if isinstance(outcome, Done):
                results.append(self._result(stream, arrival, outcome, reset, now))
            else:
                failed.append(outcome)
                self._fail(stream, outcome)
        if failed and not results and not self._streams:
            raise failed[0]
        return results

    def _segment(self, jobs: Sequence[Job]) -> list[Done | Exception]:
        """Results of a batch. If the batch fails, each stream is run alone and gives its result or error."""
        if not jobs:
            return []
        try:
            return [*self.batcher.step(jobs)]
        except Exception as error:  # noqa: BLE001  (the boundary between streams)
            # Of any kind: states are unchanged, and the frame of one stream must not affect the others.
            if len(jobs) == 1:
                return [error]
        return [outcome for job in jobs for outcome in self._segment([job])]

    def _fail(self, stream: _Stream, error: Exception) -> None:
        """End a stream on which the model fails."""
        name, report = stream.report.name, stream.report
        message = f"frame {report.frames} cannot be segmented: {type(error).__name__}: {error}"
        logger.error(f"{name} ends: {message}", exc_info=error)
        try:
            self.remove(name)
        except RuntimeError as hang:
            message += f"; {hang}"
        with self._wake:
            report.decoded -= 1
            report.add("failed", message)
            report.error = message

    def close(self) -> None:
        """Stop all streams and end all threads.

        Raises:
            RuntimeError: a decoder hangs; the others are closed all the same.
        """
        errors = []
        for name in list(self._streams):
            try:
                self.remove(name)
            except RuntimeError as error:
                errors.append(str(error))
        self.batcher.close()
        if errors:
            raise RuntimeError("; ".join(errors))

    def __enter__(self) -> StreamEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _stream(self, name: str) -> _Stream:
        if name not in self._streams:
            raise ValueError(f"no running stream {name!r}; running: {', '.join(self._streams) or 'none'}")
        return self._streams[name]

    def _collect(self, timeout: float | None) -> list[tuple[_Stream, Arrival]]:
        """Wait for frames and take them; retire the streams that have ended."""
        with self._wake:
            self._wake.wait_for(lambda: self._any(StreamReader.ready) or self._all(StreamReader.finished), timeout)
            if self.max_wait and self._any(StreamReader.ready):
                self._wake.wait_for(self._all_ready, self.max_wait)
            streams = list(self._streams.values())
            # Streams left out because of max_batch come first in the next tick.
            start = self._turn % max(len(streams), 1)
            ready = [s for s in streams[start:] + streams[:start] if s.reader.ready()][: self.max_batch]
            if ready:
                self._turn = streams.index(ready[-1]) + 1
            taken = [(stream, stream.reader.take()) for stream in ready]
            over = [s for s in streams if s not in ready and s.reader.finished()]
        for stream in over:
            self.remove(stream.report.name)
            if stream.reader.stop_request is not None:
                raise stream.reader.stop_request
        return taken

    def _any(self, test: Callable[[StreamReader], bool]) -> bool:
        return any(test(stream.reader) for stream in self._streams.values())

    def _all(self, test: Callable[[StreamReader], bool]) -> bool:
        return all(test(stream.reader) for stream in self._streams.values())

    def _all_ready(self) -> bool:
        return all(s.reader.ready() or s.reader.finished() for s in self._streams.values())

    def _apply_rules(self, stream: _Stream, arrival: Arrival) -> str:
        """Compare a frame with the previous one; reset the state if they do not belong together."""
        frame, last = arrival.frame, stream.seconds
        size, before = frame.image.shape[:2], stream.size
        stream.seconds, stream.size = frame.seconds, size
        kind = message = ""
        if arrival.reopened:
            kind = "reconnected"  # the reader has reported it
        elif last is not None and frame.seconds < last:
            kind, message = "seek", f"timestamps go back from {last:.3f} s to {frame.seconds:.3f} s"
        elif last is not None and frame.seconds - last > max(self.max_gap, 2 / float(stream.reader.fps)):
            kind, message = "gap", f"timestamps jump ahead from {last:.3f} s to {frame.seconds:.3f} s"
        elif before and size != before:
            kind, message = "resolution", f"frames change from {before[0]}x{before[1]} to {size[0]}x{size[1]} pixels"
        if kind:
            stream.state, stream.since_reset = self.stream.init_state(), 0
            self.batcher.forget(stream.report.name)
            with self._wake:
                stream.report.resets[kind] += 1
                if message:
                    stream.report.add(kind, message)
        return kind

    def _result(self, stream: _Stream, arrival: Arrival, done: Done, reset: str, now: float) -> StreamResult:
        report = stream.report
        stream.state = done.state
        stream.since_reset += 1
        with self._wake:
            number = report.frames
            report.frames += 1
            report.keyframes += bool(done.keyframe)
        return StreamResult(
            report.name, number, arrival.frame, done.output, done.keyframe, reset, now - arrival.arrived
        )


def _opener(source: Source, fps: float | Fraction | None) -> OpenSource:
    if isinstance(source, FrameSource):
        return _Once(source)
    if callable(source):
        return source
    return lambda on_problem: open_source(source, fps, on_problem)


class _Once:
    """Returns an open source, once."""

    def __init__(self, source: FrameSource) -> None:
        self.source: FrameSource | None = source

    def __call__(self, on_problem: OnProblem) -> FrameSource:
        source, self.source = self.source, None
        if source is None:
            raise ValueError("a source that was opened by the caller cannot be opened again")
        return source
