"""Video files, written by PyAV. :mod:`the_mask.inference.live.sources` reads them.

A frame is a uint8 array [H, W, 3], RGB.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from av.video.stream import VideoStream

from the_mask.data.files import check_writable, sync_file, sync_folder
from the_mask.inference.live.frame_source import DEFAULT_FPS, Frame, FrameSource, TimedFrame, check_fps
from the_mask.inference.live.sources import open_source
from the_mask.inference.live.video_file import HD_LINES
from the_mask.inference.rendering.sound import SoundCopy

__all__ = ["ENCODERS", "FrameSource", "VideoWriter", "best_encoder", "fit_into", "open_source"]

logger = logging.getLogger(__name__)
# Best first; the available ones depend on how FFmpeg was built.
ENCODERS = ("libx264", "libopenh264", "mpeg4")
PIXEL_FORMAT = "yuv420p"  # supported by every player; needs even sides
# Minimum resolution of stored times (ticks per second); MPEG-4 Part 2 allows at most 65535.
TICKS, MAX_TICKS = 10_000, 65_535
# Matrix of the colours: conversion, its tag (as H.273 numbers it), primaries, transfer.
HD_COLOURS = (Colorspace.ITU709, 1, ColorPrimaries.BT709, ColorTrc.BT709)
SD_COLOURS = (Colorspace.ITU601, 6, ColorPrimaries.SMPTE170M, ColorTrc.SMPTE170M)


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
    """Writes frames to a video file, which gets its name when it is complete (:meth:`close`).

    The first frame gives the size, odd sides padded by one pixel. Frames of another size are scaled to fit and
    centred on black. On an error inside a ``with`` block the frames written so far are kept as a playable file.
    Colours are BT.709 from 720 lines on, BT.601 below, and tagged so.

    Args:
        path: ``.mp4``, ``.mkv``, ``.mov`` or ``.avi``.
        fps: frames per second; on average, for frames that have their own times.
        encoder: FFmpeg's name; None takes :func:`best_encoder`.
        sound: an input's :attr:`FrameSource.sound`, copied along with frames that have that input's times.

    Raises:
        ValueError: other suffix, a name that cannot be written, bad rate, unknown encoder.
    """

    FORMATS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov", ".avi": "avi"}  # noqa: RUF012

    def __init__(
        self,
        path: str | Path,
        fps: float | Fraction = DEFAULT_FPS,
        encoder: str | None = None,
        sound: str | None = None,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in self.FORMATS:
            raise ValueError(f"output {self.path}: expected a name that ends in {', '.join(self.FORMATS)}")
        self.fps = check_fps(fps)
        if encoder is not None and not _can_encode(encoder):
            raise ValueError(f"unknown encoder {encoder!r}; usual ones: {', '.join(ENCODERS)}")
        self.encoder = encoder or best_encoder()
        self.frames = 0
        self.size: tuple[int, int] | None = None
        self._format = self.FORMATS[self.path.suffix.lower()]
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        check_writable(self.path, self._partial)
        self._time_base = _time_base(self.fps, self._format)
        self._container: Any = None
        # The open partial file: two processes that wrote it at once would make a file that cannot be played.
        self._lock: int | None = None
        self._stream: VideoStream | None = None
        self._sound_url = sound
        self._sound: SoundCopy | None = None
        self._reformatter = VideoReformatter()
        self._warned = False
        # The frame that waits for the next one's time, its tick, and its end if none follows.
        self._waiting: tuple[Any, int, int] | None = None
        # The input's time at the output's time 0, and the last frame's input time.
        self._origin = self._last = 0.0

    def check_size(self, height: int, width: int) -> None:
        """Check, before anything is written, that the encoder supports frames of this size.

        Raises:
            ValueError: it does not.
        """
        context: Any = av.CodecContext.create(self.encoder, "w")
        self._set_up(context, height, width)
        try:
            context.open()
        except (av.error.FFmpegError, ValueError) as error:
            raise ValueError(
                f"output {self.path} would be {width}x{height} pixels (width x height), which the encoder "
                f"{self.encoder} does not take ({error}): use smaller frames, no legend, or no input beside it"
            ) from error

    def write(self, frame: Frame | TimedFrame) -> None:
        """Append a frame, uint8 RGB [H, W, 3].

        A frame with a time is shown at that time, relative to the first one, and for its own duration if no other
        follows; where times go back, the output continues. Frames without a time are 1 / fps apart. AVI has a constant
        rate, so times are rounded.

        Raises:
            ValueError: an array of another form.
            OSError: the file cannot be written.
        """
        duration = None
        seconds = float(self.frames / self.fps)
        if isinstance(frame, TimedFrame):
            frame, seconds, duration = frame
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or not frame.size:
            raise ValueError(f"a frame is uint8 [H, W, 3], got {frame.dtype} {frame.shape}")
        if self._stream is None:
            self._open(frame.shape[0], frame.shape[1])
            self._origin = seconds
        elif seconds <= self._last:
            if self._sound is not None:
                self._sound.stop(f"times go back from {self._last:.1f} s to {seconds:.1f} s")
            self._origin += seconds - self._last - float(1 / self.fps)
        self._last = seconds
        assert self.size is not None
        if frame.shape[:2] != self.size and not self._warned:
            self._warned = True
            height, width = self.size
            logger.warning(f"{self.path}: frame {self.frames} is {frame.shape[:2]}; fitted into {height}x{width}")
        tick = round((seconds - self._origin) / self._time_base)
        if self._waiting is not None:
            tick = max(tick, self._waiting[1] + 1)
            self._encode(until=tick)
        if self._sound is not None:
            self._sound.write_until(seconds, self._origin)
        shown = float(1 / self.fps) if duration is None else duration
        rgb = av.VideoFrame.from_ndarray(_pad_even(fit_into(frame, *self.size)), format="rgb24")
        space, _, primaries, transfer = self._colours(frame.shape[0])
        picture = self._reformatter.reformat(
            rgb, format=PIXEL_FORMAT, dst_colorspace=space, dst_color_range=ColorRange.MPEG
        )
        picture.color_primaries, picture.color_trc = primaries, transfer
        self._waiting = (picture, tick, tick + max(1, round(shown / self._time_base)))
        self.frames += 1

    def _encode(self, until: int) -> None:
        """Encode the waiting frame, shown until a tick."""
        assert self._waiting is not None
        assert self._stream is not None
        picture, tick, _ = self._waiting
        picture.time_base, picture.pts, picture.duration = self._time_base, tick, until - tick
        for packet in self._stream.encode(picture):
            self._container.mux(packet)

    def _colours(self, height: int) -> tuple[Colorspace, int, ColorPrimaries, ColorTrc]:
        height = height if self.size is None else self.size[0]
        return HD_COLOURS if height >= HD_LINES else SD_COLOURS

    def _set_up(self, context: Any, height: int, width: int) -> None:
        context.height, context.width = height + height % 2, width + width % 2
        context.pix_fmt = PIXEL_FORMAT
        context.framerate, context.time_base = self.fps, self._time_base
        context.color_range = ColorRange.MPEG
        _, context.colorspace, context.color_primaries, context.color_trc = self._colours(height)
        if self.encoder == "libx264":
            # No B-frames: with variable times, MP4 would compute its length in decoding order.
            context.options = {"crf": "18", "preset": "veryfast", "bf": "0"}
        else:
            # A quarter of a byte per pixel keeps the text of the legend readable with older encoders.
            context.bit_rate = int(2 * height * width * self.fps)

    def _open(self, height: int, width: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"output {self.path} is being written by another process: name another file") from error
        except OSError as error:
            logger.warning("%s cannot be locked (%s): take care that nothing else writes it", self._partial, error)
        # Without the prefix a name such as 10:00.mp4 would be taken for a protocol.
        self._container = av.open(f"file:{self._partial}", "w", format=self._format)
        stream: Any = self._container.add_stream(self.encoder, rate=self.fps)
        self._set_up(stream.codec_context, height, width)
        stream.time_base = self._time_base
        self.size = (height, width)
        self._stream = stream
        if self._sound_url is not None:
            self._sound = SoundCopy(self._sound_url, self._container, self._format)

    def close(self) -> None:
        """Finish the file and give it its name. Without a single frame nothing is written.

        Raises:
            OSError: it cannot be finished (disk full); the unfinished file is removed, an older file of that name is
                kept.
        """
        try:
            if self._container is not None and self._stream is not None:
                self._finish()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _finish(self) -> None:
        assert self._stream is not None
        try:
            if self._waiting is not None:
                end = self._waiting[2]
                self._encode(until=end)
                self._waiting = None
                if self._sound is not None:
                    self._sound.write_until(self._origin + float(end * self._time_base), self._origin)
            for packet in self._stream.encode():
                self._container.mux(packet)
            self._container.close()
        except OSError:
            # A full disk: the partial file has no index and cannot be played.
            self._partial.unlink(missing_ok=True)
            raise
        finally:
            self._container = None
            if self._sound is not None:
                self._sound.close()
        sync_file(self._partial)
        self._partial.replace(self.path)
        sync_folder(self.path.parent)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _time_base(fps: Fraction, format_name: str) -> Fraction:
    """The unit of stored times: exact for frames at a constant rate, nearly exact for others."""
    if format_name == "avi":
        return 1 / fps
    if fps.numerator > MAX_TICKS:
        return Fraction(1, 60_000)
    return Fraction(1, fps.numerator * min(math.ceil(TICKS / fps.numerator), MAX_TICKS // fps.numerator))


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
    if height % 2 == 0 and width % 2 == 0:
        return frame
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
