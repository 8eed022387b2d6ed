"""What every input is once it is open: frames with their times.

A frame is a uint8 array [H, W, 3], RGB, turned upright, with square pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]
# Told what is wrong with a source that goes on all the same.
OnProblem = Callable[[str], None]
# For folders, and for files and cameras that do not tell: the rate of VSPW.
DEFAULT_FPS = Fraction(15)
# Higher rates than this are units of time that somebody took for a rate.
MAX_FPS = 10_000


class TimedFrame(NamedTuple):
    """A frame, its presentation time in seconds, and how long it is shown (None: until the next one, or not known).

    Sources with neither stored nor measured times count number / rate.
    """

    image: Frame
    seconds: float
    duration: float | None = None


class FrameSource:
    """An open input: iterate over it once to get its frames; use it as a context manager, or call :meth:`close`.

    Attributes:
        name: file name, folder, URL or ``camera N``, for messages.
        fps: frames per second (of a video with a variable rate: on average).
        num_frames: number of frames, or None when it is not known beforehand (cameras, some containers).
        live: it delivers at its own pace, so what is not taken in time is late.
        size: (height, width) of the first frame, where that is known before it is taken.
        path: the file or folder on this machine that it reads, if any.
        sound: what to open for the sound that belongs to the frames' times; None without one.
    """

    def __init__(
        self,
        name: str,
        frames: Iterable[Frame | TimedFrame],
        fps: Fraction,
        num_frames: int | None,
        close: Callable[[], Any],
        live: bool = False,
        seek: Callable[[float], None] | None = None,
        *,
        size: tuple[int, int] | None = None,
        path: Path | None = None,
        sound: str | None = None,
    ) -> None:
        """``frames`` may come with times or without; ``seek`` makes ``frames`` go on at another time."""
        self.name = name
        self.fps = fps
        self.num_frames = num_frames
        self.live = live
        self.size, self.path, self.sound = size, path, sound
        self._frames = iter(frames)
        self._close = close
        self._seek = seek

    def __iter__(self) -> Iterator[Frame]:
        for frame in self._frames:
            yield frame.image if isinstance(frame, TimedFrame) else frame

    def timed(self) -> Iterator[TimedFrame]:
        """The frames with their times (in place of iterating over the source itself)."""
        for number, frame in enumerate(self._frames):
            yield frame if isinstance(frame, TimedFrame) else TimedFrame(frame, float(number / self.fps))

    @property
    def seekable(self) -> bool:
        """Whether :meth:`seek` works."""
        return self._seek is not None

    def seek(self, seconds: float) -> None:
        """Go on with the frame shown at this time; call it from the thread that iterates.

        Raises:
            ValueError: a negative time, or a source without seeking (cameras, live URLs).
        """
        if self._seek is None:
            raise ValueError(f"{self.name} cannot seek: it is live")
        if not seconds >= 0:
            raise ValueError(f"{self.name}: seek to {seconds} s; expected 0 or more")
        self._seek(seconds)

    def close(self) -> None:
        """Release the file or the camera."""
        self._close()

    def __enter__(self) -> FrameSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_fps(fps: float | Fraction) -> Fraction:
    """A rate as a small fraction: 30000/1001 from 29.97002997, 1/2500 from 0.0004.

    Raises:
        ValueError: not above 0, or above :data:`MAX_FPS`.
    """
    if not 0 < fps <= MAX_FPS:
        raise ValueError(f"frames per second {fps}: expected a number above 0, at most {MAX_FPS}")
    exact = Fraction(fps)
    # Container time bases are small fractions; 1001 covers 30000/1001 and its kin.
    small = exact.limit_denominator(1001)
    rate = small if abs(small - exact) * 10**6 <= exact else exact.limit_denominator(10**6)
    if not rate:
        raise ValueError(f"frames per second {fps}: expected at least 0.000001")
    return rate


class Position:
    """The frames of a source that are still to come; a seek replaces them."""

    def __init__(self, frames: Iterator[TimedFrame]) -> None:
        self._frames = frames

    def __iter__(self) -> Position:
        return self

    def __next__(self) -> TimedFrame:
        return next(self._frames)

    def move(self, frames: Iterator[TimedFrame]) -> None:
        """Go on with other frames."""
        self._frames = frames

    def first(self, none: str) -> TimedFrame:
        """The next frame, which still is to come, read now so that its errors come before any work is done.

        Raises:
            ValueError: ``none``, when there is no frame.
        """
        frame = next(self._frames, None)
        if frame is None:
            raise ValueError(none)
        self._frames = chain([frame], self._frames)
        return frame
