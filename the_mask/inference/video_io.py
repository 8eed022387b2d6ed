"""Frames in and out: video files (PyAV), folders of images, cameras; video files written by PyAV.

A frame is a uint8 array [H, W, 3], RGB, turned upright.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import cv2
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray

from the_mask.data.io import read_image
from the_mask.data.video_tree import IMAGE_SUFFIXES, natural_key

logger = logging.getLogger(__name__)
Frame = NDArray[np.uint8]
# For folders, and for files and cameras that do not tell: the rate of VSPW.
DEFAULT_FPS = Fraction(15)
# Best first; which of them exist depends on how FFmpeg was built.
ENCODERS = ("libx264", "libopenh264", "mpeg4")
PIXEL_FORMAT = "yuv420p"  # the one that every player understands; it needs even sides


class FrameSource:
    """An open input: iterate over it once to get its frames; use it as a context manager, or call :meth:`close`.

    Attributes:
        name: file name, folder or ``camera N``, for messages.
        fps: frames per second.
        num_frames: number of frames, or None when it is not known beforehand (cameras, some containers).
    """

    def __init__(
        self, name: str, frames: Iterable[Frame], fps: Fraction, num_frames: int | None, close: Callable[[], Any]
    ) -> None:
        self.name = name
        self.fps = fps
        self.num_frames = num_frames
        self._frames = iter(frames)
        self._close = close

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def close(self) -> None:
        """Release the file or the camera."""
        self._close()

    def __enter__(self) -> FrameSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_source(source: str | Path | int, fps: float | Fraction | None = None) -> FrameSource:
    """Open a video file, a folder of frames, a camera (index) or a stream URL. The first frame is decoded at once.

    Args:
        source: path, URL, or camera index (an int, or a string of digits that is no path).
        fps: overrides the rate of the input; folders have none of their own and default to 15.

    Raises:
        FileNotFoundError: no such file, folder or camera.
        ValueError: unreadable video, video without a frame, folder without images.
    """
    text, path = str(source), Path(source) if not isinstance(source, int) else None
    rate = None if fps is None else _check_fps(fps)
    if "://" in text:
        return _open_video(text, rate)
    if path is not None and path.is_dir():
        return _open_folder(path, rate)
    if path is not None and path.is_file():
        return _open_video(text, rate)
    if text.isdecimal():
        return _open_camera(int(text), rate)
    raise FileNotFoundError(f"input {text} is neither a video file, a folder of frames, nor a camera index (0, 1, ...)")


def _check_fps(fps: float | Fraction) -> Fraction:
    if not 0 < fps < 1000:
        raise ValueError(f"frames per second {fps}: expected a number between 0 and 1000")
    # Container time bases are small fractions; 1001 covers 30000/1001 and its kin.
    return Fraction(fps).limit_denominator(1001)


def _open_folder(folder: Path, fps: Fraction | None) -> FrameSource:
    """Images of a folder in natural order (``f9`` before ``f10``), or of its ``origin`` (a video of a VSPW tree)."""
    images = _images_of(folder) or _images_of(folder / "origin")
    if not images:
        raise ValueError(f"folder {folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    frames = map(read_image, images)
    return FrameSource(str(folder), _first_at_once(frames), fps or DEFAULT_FPS, len(images), lambda: None)


def _images_of(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    images = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    return sorted(images, key=lambda p: natural_key(p.stem))


def _open_video(name: str, fps: Fraction | None) -> FrameSource:
    try:
        container = av.open(name)
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"video {name} cannot be opened, it is truncated or not a video: {error}") from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{name} has no video track")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    try:
        frames = _first_at_once(_decode(container, name))
    except ValueError:
        container.close()
        raise
    rate = fps or stream.average_rate or stream.guessed_rate
    return FrameSource(name, frames, _check_fps(rate or DEFAULT_FPS), stream.frames or None, container.close)


def _decode(container: Any, name: str) -> Iterator[Frame]:
    count = 0
    try:
        for frame in container.decode(video=0):
            # Stored display rotation, in degrees counter-clockwise.
            turns = round(frame.rotation / 90) % 4
            yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
            count += 1
    except av.error.FFmpegError as error:
        raise ValueError(f"video {name} cannot be decoded after frame {count}: {error}") from error
    if count == 0:
        raise ValueError(f"video {name} holds no frame")


def _open_camera(index: int, fps: Fraction | None) -> FrameSource:
    capture = cv2.VideoCapture(index)
    if not capture.isOpened():
        raise FileNotFoundError(f"camera {index} cannot be opened: it does not exist, is in use, or access is denied")

    def frames() -> Iterator[Frame]:
        while True:
            good, image = capture.read()
            if not good:
                return
            yield np.ascontiguousarray(image[..., ::-1], dtype=np.uint8)  # BGR

    reported = capture.get(cv2.CAP_PROP_FPS)
    rate = fps or (_check_fps(reported) if 0 < reported < 1000 else DEFAULT_FPS)
    return FrameSource(f"camera {index}", frames(), rate, None, capture.release)


def _first_at_once(frames: Iterator[Frame]) -> Iterator[Frame]:
    """The same frames, with the first one read now, so that its errors come before any work is done."""
    first = next(frames)

    def chained() -> Iterator[Frame]:
        yield first
        yield from frames

    return chained()


def best_encoder() -> str:
    """The first of :data:`ENCODERS` that this FFmpeg can encode with.

    Raises:
        ValueError: it has none of them.
    """
    for name in ENCODERS:
        if _can_encode(name):
            return name
    raise ValueError(f"PyAV's FFmpeg has none of the encoders {', '.join(ENCODERS)}; install the av wheel from PyPI")


def _can_encode(name: str) -> bool:
    try:
        av.codec.Codec(name, "w")
    except ValueError:  # UnknownCodecError
        return False
    return True


class VideoWriter:
    """Write frames to a video file; it appears under its name when complete (:meth:`close`).

    The first frame gives the size, odd sides padded by one pixel. Frames of another size are scaled to fit and
    centred on black. On an error inside a ``with`` block the frames written so far are kept as a playable file.

    Args:
        path: ``.mp4``, ``.mkv``, ``.mov`` or ``.avi``.
        fps: frames per second.
        encoder: FFmpeg's name; None takes :func:`best_encoder`.

    Raises:
        ValueError: other suffix, bad rate, unknown encoder.
    """

    FORMATS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov", ".avi": "avi"}  # noqa: RUF012

    def __init__(self, path: str | Path, fps: float | Fraction = DEFAULT_FPS, encoder: str | None = None) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in self.FORMATS:
            raise ValueError(f"output {self.path}: expected a name that ends in {', '.join(self.FORMATS)}")
        self.fps = _check_fps(fps)
        if encoder is not None and not _can_encode(encoder):
            raise ValueError(f"unknown encoder {encoder!r}; usual ones: {', '.join(ENCODERS)}")
        self.encoder = encoder or best_encoder()
        self.frames = 0
        self.size: tuple[int, int] | None = None
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        self._container: Any = None
        self._stream: VideoStream | None = None
        self._warned = False

    def write(self, frame: Frame) -> None:
        """Append a frame, uint8 RGB [H, W, 3].

        Raises:
            ValueError: not such an array.
            OSError: the file cannot be written.
        """
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or not frame.size:
            raise ValueError(f"a frame is uint8 [H, W, 3], got {frame.dtype} {frame.shape}")
        if self._stream is None:
            self._open(frame.shape[0], frame.shape[1])
        assert self.size is not None
        assert self._stream is not None
        if frame.shape[:2] != self.size and not self._warned:
            self._warned = True
            height, width = self.size
            logger.warning(f"{self.path}: frame {self.frames} is {frame.shape[:2]}; fitted into {height}x{width}")
        picture = av.VideoFrame.from_ndarray(_pad_even(fit_into(frame, *self.size)), format="rgb24")
        picture.pts = self.frames
        picture.time_base = 1 / self.fps
        for packet in self._stream.encode(picture):
            self._container.mux(packet)
        self.frames += 1

    def _open(self, height: int, width: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._partial), "w", format=self.FORMATS[self.path.suffix.lower()])
        stream: Any = self._container.add_stream(self.encoder, rate=self.fps)
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = PIXEL_FORMAT
        if self.encoder == "libx264":
            stream.options = {"crf": "18", "preset": "veryfast"}
        else:
            # A quarter of a byte per pixel: text in the legend stays readable with the older encoders.
            stream.bit_rate = int(2 * height * width * self.fps)
        self.size = (height, width)
        self._stream = stream

    def close(self) -> None:
        """Finish the file and give it its name. Without a single frame nothing is written.

        Raises:
            OSError: it cannot be finished (disk full); the unfinished file is removed, an older one of that name stays.
        """
        if self._container is None:
            return
        container, self._container = self._container, None
        try:
            assert self._stream is not None
            for packet in self._stream.encode():
                container.mux(packet)
            container.close()
        except OSError:
            # A full disk: what is there has no index and cannot be played.
            self._partial.unlink(missing_ok=True)
            raise
        self._partial.replace(self.path)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def fit_into(frame: Frame, height: int, width: int) -> Frame:
    """Scale a frame, ratio kept, to fit ``height`` x ``width``, centred on black; unchanged when it has that size."""
    if frame.shape[:2] == (height, width):
        return frame
    scale = min(height / frame.shape[0], width / frame.shape[1])
    new_height, new_width = (max(1, round(side * scale)) for side in frame.shape[:2])
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    resized = cv2.resize(frame, (new_width, new_height), interpolation=interpolation)
    canvas[top : top + new_height, left : left + new_width] = resized
    return canvas


def _pad_even(frame: Frame) -> Frame:
    """Repeat the last row and column where a side is odd."""
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
