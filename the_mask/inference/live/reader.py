"""One thread per source that decodes into a bounded queue, and what it reports.

Back-pressure: ``all`` makes the decoder wait for the model, so every frame is segmented; ``latest`` throws the oldest
waiting frame away, so what is segmented is new, and counts it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from the_mask.inference.live.sources import FrameSource, OnProblem, TimedFrame
from the_mask.inference.views import as_image

logger = logging.getLogger(__name__)
MODES = ("all", "latest")
# A report keeps this many of its newest events; how many there were of each kind is counted without limit.
EVENTS_KEPT = 100
# Seconds that closing waits for a decoder; a network read gives up before.
JOIN_TIMEOUT = 30.0

OpenSource = Callable[[OnProblem], FrameSource]


class Event(NamedTuple):
    """Something a stream reports.

    Attributes:
        kind: "damaged" (a part or frame is skipped or filled in), "lost" (the source broke off), "failed" (the model
            cannot go on with the stream), "reconnected", "seek" (timestamps went back), "gap" (they jumped ahead),
            "resolution" (frames changed size).
        frame: number of frames segmented before.
        message: one line for people.
    """

    kind: str
    frame: int
    message: str


@dataclass
class StreamReport:
    """What happened to a stream; of constant size.

    Attributes:
        name: of the stream.
        decoded: frames that the decoder handed over: those segmented, dropped, or waiting.
        frames: frames segmented.
        dropped: frames thrown away in mode ``latest``; always 0 in mode ``all``.
        keyframes: frames that ran the key segmentor.
        resets: how often the state was made anew, by reason: kinds of :class:`Event`.
        counts: events by kind.
        events: the newest ones.
        error: why the stream ended early; None when its source ended by itself.
        ended: no frame will follow.
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
        """Note an event."""
        self.counts[kind] += 1
        self.events.append(Event(kind, self.frames, message))


class Arrival(NamedTuple):
    """A decoded frame: when it came (``time.perf_counter``), and whether its source was opened anew before it."""

    frame: TimedFrame
    arrived: float
    reopened: bool


class StreamReader:
    """Decodes one source in a thread of its own. :meth:`close` ends the thread; so does the end of the source."""

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
        """Open the source, here, so that its errors are raised here; then start the thread.

        Args:
            open_source: opens the source; called again for a reconnection.
            report: filled in, under ``wake``.
            wake: notified when a frame has come, and when the source has ended; guards everything shared.
            mode: "all" or "latest"; default: "latest" for a live source.
            queue_size: frames that wait at most; default 4, or 1 in mode "latest".
            realtime: give frames out no sooner than their timestamps say, as a camera does.
            reconnects: how often in a row a camera or live URL that breaks off is opened again; of a file behind a URL,
                which goes on after the last frame that came, how often in all.
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
        """Whether a frame waits. Hold ``wake``."""
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
        """Go on with the frame shown at this time; frames that wait already are forgotten."""
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
                # A file that breaks at the same place each time would be opened for ever.
                if source.live and self.report.decoded > before:
                    attempts = allowed
                # A file that ended by itself is not a connection that broke.
                if self._stopping.is_set() or (error is None and not source.live):
                    break
                self._note("lost", error or f"{source.name} gives no more frames")
                again = self._reopen(attempts)
                if again is None:
                    break
                source, attempts = again
                # The frames of a file go on where they broke off; those of a camera do not.
                reopened = source.live
        except Exception as problem:
            # A defect in the source's own code, of whatever kind: it must not stop the other streams.
            error = f"{type(problem).__name__}: {problem}"
            logger.exception(f"{self.report.name} ends: a defect in its source")
            self._note("lost", error)
        except (KeyboardInterrupt, SystemExit) as request:
            # To end the program, not the stream: the engine raises it in the caller's thread.
            self.stop_request = request
        finally:
            with self._wake:
                self.report.error, self._finished = error, True
                self._wake.notify_all()

    def _reopen(self, attempts: int) -> tuple[FrameSource, int] | None:
        """The source once more and the attempts left; None when there is none left."""
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
        """Wait for a frame's time; False when the stream was closed meanwhile."""
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
