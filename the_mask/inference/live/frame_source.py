"""Open inputs: frames with their times.

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
# Called with a description of a problem that does not stop the source.
OnProblem = Callable[[str], None]
# For folders, and for files and cameras without a known rate: the rate of VSPW.
DEFAULT_FPS = Fraction(15)
# Higher values are time units mistaken for a rate.
MAX_FPS = 10_000


class TimedFrame(NamedTuple):
    """A frame, its presentation time in seconds, and how long it is shown (None: until the next one, or not known).

    Sources without stored or measured times use number / rate.
    """

    image: Frame
    seconds: float
    duration: float | None = None


class FrameSource:
    """An open input: iterate over it once to get its frames; use it as a context manager, or call :meth:`close`.

    Attributes:
        name: file name, folder, URL or ``camera N``, for messages.
        fps: frames per second (of a video with a variable rate: on average).
        num_frames: number of frames, or None if it is not known in advance (cameras, some containers).
        live: whether it delivers frames at its own pace, so that frames not taken in time are late.
        size: (height, width) of the first frame, if known before it is read.
        path: the file or folder on this machine that it reads, if any.
        stored_size: (height, width) of the first frame, upright, in the pixels that are stored, which annotation
            tools show; another one than ``size`` for anamorphic video.
        sound: path or URL of the sound that belongs to the frames' times; None without sound.
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
        stored_size: tuple[int, int] | None = None,
        path: Path | None = None,
        sound: str | None = None,
    ) -> None:
        """``frames`` yields frames with or without times; ``seek`` makes it continue at another time."""
        self.name = name
        self.fps = fps
        self.num_frames = num_frames
        self.live = live
        self.size, self.stored_size, self.path, self.sound = size, stored_size or size, path, sound
        self._frames = iter(frames)
        self._close = close
        self._seek = seek

    def __iter__(self) -> Iterator[Frame]:
        for frame in self._frames:
            yield frame.image if isinstance(frame, TimedFrame) else frame

    def timed(self) -> Iterator[TimedFrame]:
        """Iterate over the frames with their times (instead of iterating over the source itself)."""
        for number, frame in enumerate(self._frames):
            yield frame if isinstance(frame, TimedFrame) else TimedFrame(frame, float(number / self.fps))

    @property
    def seekable(self) -> bool:
        """Whether :meth:`seek` works."""
        return self._seek is not None

    def seek(self, seconds: float) -> None:
        """Continue with the frame shown at this time; call it from the thread that iterates.

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
    # Container time bases are small fractions; 1001 covers 30000/1001 and the like.
    small = exact.limit_denominator(1001)
    rate = small if abs(small - exact) * 10**6 <= exact else exact.limit_denominator(10**6)
    if not rate:
        raise ValueError(f"frames per second {fps}: expected at least 0.000001")
    return rate


class Position:
    """The remaining frames of a source; a seek replaces them."""

    def __init__(self, frames: Iterator[TimedFrame]) -> None:
        self._frames = frames

    def __iter__(self) -> Position:
        return self

    def __next__(self) -> TimedFrame:
        return next(self._frames)

    def move(self, frames: Iterator[TimedFrame]) -> None:
        """Continue with other frames."""
        self._frames = frames

    def first(self, none: str) -> TimedFrame:
        """Read the next frame ahead (it will still be delivered), so that errors come before any work is done.

        Raises:
            ValueError: there is no frame; the message is ``none``.
        """
        frame = next(self._frames, None)
        if frame is None:
            raise ValueError(none)
        self._frames = chain([frame], self._frames)
        return frame
