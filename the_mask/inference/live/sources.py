"""Frames in: video files and network URLs (PyAV), folders of images, cameras.

A frame is a uint8 array [H, W, 3], RGB, turned upright.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from the_mask.data.io import read_image
from the_mask.data.video_tree import IMAGE_SUFFIXES, natural_key

Frame = NDArray[np.uint8]
# Told what is wrong with a source that goes on all the same.
OnProblem = Callable[[str], None]
# For folders, and for files and cameras that do not tell: the rate of VSPW.
DEFAULT_FPS = Fraction(15)
# This many packets in a row that cannot be decoded are no accident: the source is given up.
MAX_BAD_PACKETS = 250
# Seconds to open a URL, and to wait for its next packet.
NETWORK_TIMEOUT = (10.0, 10.0)
# URLs of these protocols deliver at their own pace; a file behind http waits for its reader.
LIVE_PROTOCOLS = ("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "srt", "tcp")


class TimedFrame(NamedTuple):
    """A frame and its presentation time in seconds; with neither stored nor measured times, number / rate."""

    image: Frame
    seconds: float


class FrameSource:
    """An open input: iterate over it once to get its frames; use it as a context manager, or call :meth:`close`.

    Attributes:
        name: file name, folder, URL or ``camera N``, for messages.
        fps: frames per second (of a video with a variable rate: on average).
        num_frames: number of frames, or None when it is not known beforehand (cameras, some containers).
        live: it delivers at its own pace, so what is not taken in time is late.
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
    ) -> None:
        """``frames`` may come with times or without; ``seek`` makes ``frames`` go on at another time."""
        self.name = name
        self.fps = fps
        self.num_frames = num_frames
        self.live = live
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


def open_source(
    source: str | Path | int, fps: float | Fraction | None = None, on_problem: OnProblem | None = None
) -> FrameSource:
    """Open a video file, a folder of frames, a camera (index) or a stream URL. The first frame is decoded at once.

    Args:
        source: path, URL, or camera index (an int, or a string of digits that is no path).
        fps: overrides the rate of the input; folders have none of their own and default to 15.
        on_problem: called with one line for each damaged part that is skipped or filled in. Without it damage that
            cannot be filled in raises a ValueError while iterating.

    Raises:
        FileNotFoundError: no such file, folder or camera.
        ValueError: unreadable or empty video, video without a frame, folder without images, URL without an answer.
    """
    text, path = str(source), Path(source) if not isinstance(source, int) else None
    rate = None if fps is None else check_fps(fps)
    if "://" in text:
        return _open_video(text, rate, on_problem)
    if path is not None and path.is_dir():
        return _open_folder(path, rate, on_problem)
    if path is not None and path.is_file():
        if not path.stat().st_size:
            raise ValueError(f"video {path} is empty (0 bytes)")
        return _open_video(text, rate, on_problem)
    if text.isdecimal():
        return _open_camera(int(text), rate)
    raise FileNotFoundError(f"input {text} is neither a video file, a folder of frames, nor a camera index (0, 1, ...)")


def check_fps(fps: float | Fraction) -> Fraction:
    """A rate as a small fraction.

    Raises:
        ValueError: outside 0..1000.
    """
    if not 0 < fps < 1000:
        raise ValueError(f"frames per second {fps}: expected a number between 0 and 1000")
    # Container time bases are small fractions; 1001 covers 30000/1001 and its kin.
    return Fraction(fps).limit_denominator(1001)


def _open_folder(folder: Path, fps: Fraction | None, on_problem: OnProblem | None) -> FrameSource:
    """Images of a folder in natural order (``f9`` before ``f10``), or of its ``origin`` (a video of a VSPW tree)."""
    images = _images_of(folder) or _images_of(folder / "origin")
    if not images:
        raise ValueError(f"folder {folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    rate = fps or DEFAULT_FPS
    position = 0

    def frames() -> Iterator[TimedFrame]:
        nonlocal position
        while position < len(images):
            number, position = position, position + 1
            try:
                image = read_image(images[number])
            except ValueError as error:
                if on_problem is None:
                    raise
                on_problem(f"skipped: {error}")
                continue
            yield TimedFrame(image, float(number / rate))

    def seek(seconds: float) -> None:
        nonlocal position
        position = round(seconds * rate)

    first = _first_at_once(frames(), f"folder {folder} holds no image that can be read")
    return FrameSource(str(folder), first, rate, len(images), lambda: None, seek=seek)


def _images_of(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    images = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    return sorted(images, key=lambda p: natural_key(p.stem))


def _open_video(name: str, fps: Fraction | None, on_problem: OnProblem | None) -> FrameSource:
    live = name.partition("://")[0].lower() in LIVE_PROTOCOLS
    try:
        # Buffering ahead would add its length to the latency of a live stream.
        options = {"fflags": "nobuffer"} if live else {}
        timeout = NETWORK_TIMEOUT if "://" in name else None
        # A title in another encoding is no reason to refuse a video.
        container = av.open(name, options=options, timeout=timeout, metadata_errors="replace")
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"video {name} cannot be opened, it is truncated or not a video: {error}") from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{name} has no video track")
    stream = container.streams.video[0]
    # Threads that work on several frames at a time hold as many back.
    stream.thread_type = "SLICE" if live else "AUTO"
    rate = check_fps(fps or stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
    decoder = _Decoder(container, stream, name, rate, on_problem)
    try:
        frames = _first_at_once(decoder.frames(), f"video {name} holds no frame")
    except ValueError:
        container.close()
        raise
    seek = None if live else decoder.seek
    return FrameSource(name, frames, rate, stream.frames or None, container.close, live, seek)


class _Decoder:
    """Decodes packet by packet, so that a damaged one costs itself only."""

    def __init__(self, container: Any, stream: Any, name: str, rate: Fraction, on_problem: OnProblem | None) -> None:
        self.container, self.stream, self.name, self.rate, self.on_problem = container, stream, name, rate, on_problem
        self.count = 0
        self.skip_before: float | None = None
        self.packets: Iterator[Any] = iter(())
        self.sought = False

    def frames(self) -> Iterator[TimedFrame]:
        seconds, bad = -1.0 / float(self.rate), 0
        self.packets = self.container.demux(self.stream)
        while (packet := self._next_packet()) is not None:
            try:
                pictures = packet.decode()
            except av.error.FFmpegError as error:
                bad += 1
                where = f"video {self.name} cannot be decoded after frame {self.count}: {error}"
                if self.on_problem is None or bad >= MAX_BAD_PACKETS:
                    raise ValueError(where) from error
                self.on_problem(f"a packet is skipped, {where}")
                continue
            for picture in pictures:
                bad = 0
                stored = picture.time
                seconds = seconds + 1 / float(self.rate) if stored is None else stored
                if self.skip_before is not None and seconds < self.skip_before - 0.5 / float(self.rate):
                    continue
                self.skip_before = None
                if picture.is_corrupt and self.on_problem is not None:
                    self.on_problem(f"frame {self.count} of {self.name} is damaged; the decoder filled it in")
                # Stored display rotation, in degrees counter-clockwise.
                turns = round(picture.rotation / 90) % 4
                self.count += 1
                yield TimedFrame(np.ascontiguousarray(np.rot90(picture.to_ndarray(format="rgb24"), turns)), seconds)
                if self.sought:
                    # The rest of these pictures is from before the seek.
                    self.sought = False
                    break

    def _next_packet(self) -> Any:
        try:
            return next(self.packets, None)
        except av.error.FFmpegError as error:
            raise ValueError(f"video {self.name} cannot be read after frame {self.count}: {error}") from error

    def seek(self, seconds: float) -> None:
        # To the last frame before it that stands on its own; frames up to the wanted one are decoded and dropped.
        self.container.seek(int(seconds * av.time_base))
        self.packets = self.container.demux(self.stream)
        self.skip_before, self.sought = seconds, True


def _open_camera(index: int, fps: Fraction | None) -> FrameSource:
    capture = cv2.VideoCapture(index)
    if not capture.isOpened():
        raise FileNotFoundError(f"camera {index} cannot be opened: it does not exist, is in use, or access is denied")

    def frames() -> Iterator[TimedFrame]:
        start = time.monotonic()
        while True:
            good, image = capture.read()
            if not good:
                return
            picture = np.ascontiguousarray(image[..., ::-1], dtype=np.uint8)  # BGR
            yield TimedFrame(picture, time.monotonic() - start)

    reported = capture.get(cv2.CAP_PROP_FPS)
    rate = fps or (check_fps(reported) if 0 < reported < 1000 else DEFAULT_FPS)
    return FrameSource(f"camera {index}", frames(), rate, None, capture.release, live=True)


def _first_at_once(frames: Iterator[TimedFrame], none: str) -> Iterator[TimedFrame]:
    """The same frames, with the first one read now, so that its errors come before any work is done."""
    first = next(frames, None)
    if first is None:
        raise ValueError(none)

    def chained() -> Iterator[TimedFrame]:
        yield first
        yield from frames

    return chained()
