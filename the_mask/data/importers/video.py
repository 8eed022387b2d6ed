"""Frames of a data set out of its videos: those that have labels, and those between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from the_mask.data.files import inside
from the_mask.data.importers.common import frame_number
from the_mask.data.io import write_picture

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mxf", ".ts")
# Opens a video: frames uint8 [H, W, 3] in presentation order with their times in seconds.
OpenVideo = Callable[[Path], Iterator[tuple[np.ndarray, float]]]


@dataclass(frozen=True)
class Sampling:
    """Which frames are taken besides the labelled ones.

    Attributes:
        every: every nth one, counted from the first; 0 takes none.
        fps: so many in a second of the video, instead of ``every``.
        first: number of the video's first frame in the names of labelled ones.
    """

    every: int = 1
    fps: Fraction | None = None
    first: int = 0

    def __post_init__(self) -> None:
        if self.every < 0 or self.first < 0:
            raise ValueError(f"every {self.every}, first frame {self.first}: expected 0 or more")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"frames per second {float(self.fps):g}: expected a number above 0")


class VideoPictures:
    """Pictures that are decoded when a labelled frame asks for them.

    Names end with the frame's number. Labelled frames of a video come in ascending order, mostly; for one that lies
    behind, the video is opened once more.

    Args:
        videos: a video, or a folder of videos that are called as those of the labels.
        scratch: folder to decode into.
        open_video: see :data:`OpenVideo`.
        sampling: what else is taken.

    Raises:
        FileNotFoundError: no such file or folder.
    """

    def __init__(self, videos: Path, scratch: Path, open_video: OpenVideo, sampling: Sampling) -> None:
        if not videos.exists():
            raise FileNotFoundError(f"video {videos} does not exist")
        self.videos, self.scratch, self.sampling = videos, scratch, sampling
        self._open = open_video
        self._frames: Iterator[tuple[np.ndarray, float]] = iter(())
        self._video: Path | None = None
        self._next = sampling.first
        self._start, self._taken = 0.0, -1
        self._done: dict[Path, set[int]] = {}

    def find(self, name: str, where: str) -> Path:
        """The picture of a name such as ``cam1/frame_000012``.

        Raises:
            FileNotFoundError: no video of that name.
            ValueError: a name without a number, or a number that the video does not reach.
        """
        path = Path(name)
        stem = path.name.removesuffix(path.suffix) if path.suffix and not path.suffix[1:].isdecimal() else path.name
        number = frame_number(stem)
        if number is None:
            raise ValueError(f"{where}: frame {name} has no number at its end, so its place in the video is not known")
        video = self._file(path.parent.as_posix(), where)
        target = self._target(video, number)
        if target.is_file():
            return target
        if self._video != video or number < self._next:
            self._restart(video)
        while self._next <= number:
            if not self._step(video, wanted=number):
                raise ValueError(f"{where}: frame {number}, but {video} ends with frame {self._next - 1}")
        return target

    def rest(self, name: str) -> Iterator[tuple[int, Path]]:
        """All frames of a video that were taken, by number, after the rest of it is decoded.

        Args:
            name: of the video.
        """
        video = self._file(name, name)
        if self.sampling.every or self.sampling.fps:
            if self._video != video:
                self._restart(video)
            while self._step(video):
                pass
        for number in sorted(self._done.get(video, ())):
            yield number, self._target(video, number)

    def names(self) -> list[str]:
        """Names of the videos."""
        if self.videos.is_file():
            return [self.videos.stem]
        found = [p for p in sorted(self.videos.rglob("*")) if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file()]
        return [path.relative_to(self.videos).with_suffix("").as_posix() for path in found]

    def _file(self, name: str, where: str) -> Path:
        if self.videos.is_file():
            return self.videos
        if name in (".", ""):
            raise ValueError(f"{where}: the labels do not say of which video in {self.videos} they are; name one video")
        path = inside(self.videos, name)
        for suffix in VIDEO_SUFFIXES:
            for candidate in (path.with_name(path.name + suffix), path.with_name(path.name + suffix.upper())):
                if candidate.is_file():
                    return candidate
        raise FileNotFoundError(f"{where}: {self.videos} holds no video {name} ({', '.join(VIDEO_SUFFIXES)})")

    def _target(self, video: Path, number: int) -> Path:
        name = video.stem if video == self.videos else video.relative_to(self.videos).with_suffix("").as_posix()
        return inside(self.scratch, name, f"{number:08d}.png")

    def _restart(self, video: Path) -> None:
        self._frames, self._video, self._next = self._open(video), video, self.sampling.first
        self._taken = -1

    def _step(self, video: Path, wanted: int = -1) -> bool:
        """Decode one frame, and keep it if it is wanted; whether there was one."""
        frame = next(self._frames, None)
        if frame is None:
            return False
        pixels, seconds = frame
        number, sampling = self._next, self.sampling
        self._next += 1
        position = number - sampling.first
        if not position:
            self._start = seconds
        if sampling.fps is not None:
            # The first frame of every interval of 1 / fps seconds; times are rounded to a millionth.
            interval = int((seconds - self._start) * sampling.fps + Fraction(1, 10**6))
            keep, self._taken = interval > self._taken, max(self._taken, interval)
        else:
            keep = bool(sampling.every) and position % sampling.every == 0
        if keep or number == wanted:
            done = self._done.setdefault(video, set())
            if number not in done:
                write_picture(self._target(video, number), pixels, durable=False, compress_level=1)
                done.add(number)
        return True
