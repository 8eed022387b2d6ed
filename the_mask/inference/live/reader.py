"""One thread per source that decodes into a bounded queue, and its report.

Back-pressure: in mode ``all`` the decoder waits for the model, so every frame is segmented; in mode ``latest`` the
oldest waiting frame is dropped and counted, so the segmented frames are recent.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from the_mask.inference.live.frame_source import FrameSource, OnProblem, TimedFrame
from the_mask.inference.views import as_image

logger = logging.getLogger(__name__)
MODES = ("all", "latest")
# A report keeps this many of its newest events; the counts by kind are not limited.
EVENTS_KEPT = 100
# Seconds to wait for a decoder when closing; network reads time out earlier.
JOIN_TIMEOUT = 30.0

OpenSource = Callable[[OnProblem], FrameSource]


class Event(NamedTuple):
    """An event in a stream's report.

    Attributes:
        kind: "damaged" (a part or frame is skipped or filled in), "lost" (the source broke off), "failed" (the model
            failed on the stream), "reconnected", "seek" (timestamps went back), "gap" (they jumped ahead),
            "resolution" (frames changed size).
        frame: number of frames segmented before.
        message: one line of text.
    """

    kind: str
    frame: int
    message: str


@dataclass
class StreamReport:
    """Statistics and events of a stream; of constant size.

    Attributes:
        name: of the stream.
        decoded: number of decoded frames, whether segmented, dropped, or waiting.
        frames: number of segmented frames.
        dropped: number of frames dropped in mode ``latest``; always 0 in mode ``all``.
        keyframes: number of frames that ran the key segmentor.
        resets: number of resets by reason: kinds of :class:`Event`.
        counts: events by kind.
        events: the newest ones.
        error: why the stream ended early; None if its source ended normally.
        ended: True if no frame will follow.
    """

    name: str
    decoded: int = 0
    frames: int = 0
    dropped: int = 0
    keyframes: int = 0
    resets: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))
    error: str | None = None
    ended: bool = False

    def add(self, kind: str, message: str) -> None:
        """Add an event."""
        self.counts[kind] += 1
        self.events.append(Event(kind, self.frames, message))


class Arrival(NamedTuple):
    """A decoded frame, its arrival time (``time.perf_counter``), and whether the source was reopened before it."""

    frame: TimedFrame
    arrived: float
    reopened: bool


class StreamReader:
    """Decodes one source in its own thread, which ends with the source or at :meth:`close`."""

    def __init__(
        self,
        open_source: OpenSource,
        report: StreamReport,
        wake: threading.Condition,
        mode: str | None = None,
        queue_size: int | None = None,
        realtime: bool = False,
        reconnects: int = 0,
        reconnect_wait: float = 1.0,
    ) -> None:
        """Open the source in the caller's thread, so that errors are raised here; then start the decoding thread.

        Args:
            open_source: opens the source; called again for a reconnection.
            report: updated while holding ``wake``.
            wake: notified when a frame arrives and when the source ends; guards all shared data.
            mode: "all" or "latest"; default: "latest" for a live source.
            queue_size: largest number of waiting frames; default 4, or 1 in mode "latest".
            realtime: deliver frames at the time of their timestamps, as a camera does.
            reconnects: how often in a row a camera or live URL that breaks off is reopened. For a file behind a URL,
                which continues after the last frame received, how often in total.
            reconnect_wait: seconds before each attempt.

        Raises:
            ValueError: unknown mode, queue size below 1, or a source that cannot be opened.
            FileNotFoundError: no such source.
        """
        if mode is not None and mode not in MODES:
            raise ValueError(f"mode {mode!r}: expected one of {', '.join(MODES)}")
        if (queue_size is not None and queue_size < 1) or reconnects < 0:
            raise ValueError(f"queue_size {queue_size}, reconnects {reconnects}: expected at least 1 and at least 0")
        self.report = report
        self.realtime, self.reconnects, self.reconnect_wait = realtime, reconnects, reconnect_wait
        self._open, self._wake = open_source, wake
        self._queue: deque[Arrival] = deque()
        self._stopping = threading.Event()
        self._finished = False
        self._wanted: float | None = None
        self._clock: tuple[float, float] | None = None
        self._last: float | None = None
        self.stop_request: KeyboardInterrupt | SystemExit | None = None
        source = open_source(self._damaged)
        self.fps, self.num_frames, self.live = source.fps, source.num_frames, source.live
        self.mode = mode or ("latest" if source.live else "all")
        self.queue_size = queue_size or (1 if self.mode == "latest" else 4)
        self._thread = threading.Thread(target=self._run, args=(source,), name=f"decode {report.name}", daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        """Whether a frame is waiting. Hold ``wake``."""
        return bool(self._queue)

    def finished(self) -> bool:
        """Whether the source has ended and every frame was taken. Hold ``wake``."""
        return self._finished and not self._queue

    def take(self) -> Arrival:
        """The oldest waiting frame. Hold ``wake``."""
        arrival = self._queue.popleft()
        self._wake.notify_all()
        return arrival

    def seek(self, seconds: float) -> None:
        """Continue with the frame shown at this time; waiting frames are discarded."""
        with self._wake:
            self._wanted = seconds
            self._forget_queue()
            self._wake.notify_all()

    def close(self) -> None:
        """Stop decoding and wait for the thread.

        Raises:
            RuntimeError: the thread hangs in the source's driver.
        """
        self._stopping.set()
        with self._wake:
            self._forget_queue()
            self._wake.notify_all()
        self._thread.join(JOIN_TIMEOUT)
        if self._thread.is_alive():
            raise RuntimeError(f"{self.report.name}: the decoder does not return after {JOIN_TIMEOUT:.0f} s")

    def _forget_queue(self) -> None:
        self.report.decoded -= len(self._queue)
        self._queue.clear()

    def _run(self, source: FrameSource) -> None:
        error: str | None = None
        # A damaged file would only break again at the same place.
        allowed = self.reconnects if source.live or "://" in source.name else 0
        attempts, reopened = allowed, False
        try:
            while True:
                before = self.report.decoded
                try:
                    with source:
                        self._decode(source, reopened)
                    error = None
                except (ValueError, OSError) as problem:
                    error = str(problem)
                # A file that breaks at the same place each time would be reopened for ever.
                if source.live and self.report.decoded > before:
                    attempts = allowed
                # The normal end of a file is not a broken connection.
                if self._stopping.is_set() or (error is None and not source.live):
                    break
                self._note("lost", error or f"{source.name} gives no more frames")
                again = self._reopen(attempts)
                if again is None:
                    break
                source, attempts = again
                # A file continues where it broke off; a camera does not.
                reopened = source.live
        except Exception as problem:
            # Any defect in the source's own code must not stop the other streams.
            error = f"{type(problem).__name__}: {problem}"
            logger.exception(f"{self.report.name} ends: a defect in its source")
            self._note("lost", error)
        except (KeyboardInterrupt, SystemExit) as request:
            # Meant to end the program, not the stream: the engine raises it in the caller's thread.
            self.stop_request = request
        finally:
            with self._wake:
                self.report.error, self._finished = error, True
                self._wake.notify_all()

    def _reopen(self, attempts: int) -> tuple[FrameSource, int] | None:
        """Reopen the source; returns it and the remaining attempts, or None if none is left."""
        while attempts > 0:
            attempts -= 1
            if self._stopping.wait(self.reconnect_wait):
                return None
            try:
                source = self._open(self._damaged)
            except (ValueError, OSError) as error:
                self._note("lost", str(error))
                continue
            self._clock = None
            self._note("reconnected", f"{source.name} is back")
            return source, attempts
        return None

    def _decode(self, source: FrameSource, reopened: bool) -> None:
        after = None if source.live else self._last
        if after is not None and source.seekable:
            source.seek(after)
        for frame in source.timed():
            if self._stopping.is_set():
                return
            if after is not None and frame.seconds <= after:
                continue
            after, self._last = None, frame.seconds
            try:
                frame = frame._replace(image=as_image(frame.image))
            except ValueError as error:
                self._damaged(f"{source.name}: a frame at {frame.seconds:.3f} s is skipped: {error}")
                continue
            if self.realtime and not self._pace(frame.seconds):
                return
            with self._wake:
                if self.mode == "latest" and len(self._queue) >= self.queue_size:
                    reopened |= self._queue.popleft().reopened
                    self.report.dropped += 1
                while len(self._queue) >= self.queue_size and not self._stopping.is_set() and self._wanted is None:
                    self._wake.wait()
                if self._wanted is None and not self._stopping.is_set():
                    self.report.decoded += 1
                    self._queue.append(Arrival(frame, time.perf_counter(), reopened))
                    reopened = False
                    self._wake.notify_all()
                wanted, self._wanted = self._wanted, None
            if wanted is not None:
                source.seek(wanted)
                self._clock = self._last = None

    def _pace(self, seconds: float) -> bool:
        """Wait for a frame's time; False if the stream was closed meanwhile."""
        now = time.perf_counter()
        if self._clock is None or seconds < self._clock[1]:
            self._clock = (now, seconds)
        due = self._clock[0] + seconds - self._clock[1]
        return not self._stopping.wait(max(0.0, due - now))

    def _damaged(self, message: str) -> None:
        self._note("damaged", message)

    def _note(self, kind: str, message: str) -> None:
        with self._wake:
            self.report.add(kind, message)
