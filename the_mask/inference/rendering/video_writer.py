"""Video files, written by PyAV. :mod:`the_mask.inference.live.sources` reads them.

A frame is a uint8 array [H, W, 3], RGB.
"""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import cv2
import numpy as np
from av.video.stream import VideoStream

from the_mask.inference.live.sources import DEFAULT_FPS, Frame, FrameSource, check_fps, open_source

__all__ = ["ENCODERS", "FrameSource", "VideoWriter", "best_encoder", "fit_into", "open_source"]

logger = logging.getLogger(__name__)
# Best first; which of them exist depends on how FFmpeg was built.
ENCODERS = ("libx264", "libopenh264", "mpeg4")
PIXEL_FORMAT = "yuv420p"  # the one that every player understands; it needs even sides


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
        self.fps = check_fps(fps)
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
