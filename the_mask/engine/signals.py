"""Treats Ctrl-C and SIGTERM as a request to stop after the current iteration, so that a checkpoint can be written."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Launchers forward signals that the terminal has already delivered; such a copy is not a second Ctrl-C.
_ECHO_SECONDS = 1.0


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt inside the block, so they end it as Ctrl-C does.

    Ignored signals (``nohup``) stay ignored. Does nothing outside the main thread, where Python has no handlers.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(signum).name)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            signum = getattr(signal, name, None)  # Windows has no SIGHUP
            if signum is not None and signal.getsignal(signum) is not signal.SIG_IGN:
                previous[signum] = signal.signal(signum, interrupt)
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by a signal; ``exit_code`` is 128 + signal, as usual in shells (130 for Ctrl-C)."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message or f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        return 128 + self.signum

    def __reduce__(self) -> tuple[type[TrainingInterrupted], tuple[int, str]]:
        return type(self), (self.signum, str(self))


class StopRequest:
    """Records that a signal requested to stop.

    The first SIGINT or SIGTERM only sets ``signum``; a second Ctrl-C, more than a second later, stops at once. Inside
    :meth:`immediate`, the first signal stops at once, too.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0
        self._immediate = False
        self._pid = os.getpid()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside the block; does nothing outside the main thread, where Python has no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    @contextmanager
    def immediate(self, enabled: bool = True) -> Iterator[None]:
        """A signal inside the block raises :class:`TrainingInterrupted` immediately (for long, repeatable work)."""
        self._immediate = enabled
        try:
            yield
        finally:
            self._immediate = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked data worker: it ends with its parent, which still needs the rest of the current batch.
            return
        now = time.monotonic()
        if not self.signum:
            self.signum, self._since = signum, now
            logger.warning("%s: stopping after this iteration; again to stop at once", signal.Signals(signum).name)
            if self._immediate:
                raise TrainingInterrupted(signum)
        elif signum == signal.SIGINT and now - self._since > _ECHO_SECONDS:
            raise TrainingInterrupted(signum)
