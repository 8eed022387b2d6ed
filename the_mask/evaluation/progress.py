"""Progress and timing of prediction runs."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.utils import comm
from tqdm import tqdm

logger = logging.getLogger(__name__)
LOG_SECONDS = 10.0


class ProgressMeter:
    """Shows a progress bar on a terminal, logs a line every ten seconds, and the time per frame at the end.

    Args:
        name: title of the bar.
        total: number of frames of this process.
    """

    def __init__(self, name: str, total: int) -> None:
        self.name = name
        self.total = total
        self.frames = 0
        self.model_seconds = 0.0
        self._start = self._last_line = time.perf_counter()
        on_terminal = sys.stderr.isatty() and comm.is_main_process()
        self._bar = tqdm(total=total, desc=name, unit="frame", disable=not on_terminal)

    def __enter__(self) -> ProgressMeter:
        self._start = self._last_line = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self.frames and error[0] is None:
            seconds = time.perf_counter() - self._start
            logger.info(
                f"{self.name}: {self.frames} frames in {seconds:.1f} s, {seconds / self.frames:.4f} s/frame, of it "
                f"{self.model_seconds / self.frames:.4f} in the model"
            )

    @contextmanager
    def model_time(self) -> Iterator[None]:
        """Count the time inside the block as the model's. Label maps are on the CPU, so a GPU has finished by then."""
        start = time.perf_counter()
        yield
        self.model_seconds += time.perf_counter() - start

    def update(self, frames: int) -> None:
        """Count processed frames."""
        self.frames += frames
        self._bar.update(frames)
        now = time.perf_counter()
        if self._bar.disable and comm.is_main_process() and now - self._last_line > LOG_SECONDS:
            self._last_line = now
            rate = (now - self._start) / self.frames
            left = rate * (self.total - self.frames)
            logger.info(f"{self.name}: {self.frames}/{self.total} frames, {rate:.4f} s/frame, {left:.0f} s left")
