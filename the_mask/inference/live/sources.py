"""Inputs: video files and network URLs (PyAV), folders of images, pictures and animations, cameras."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from the_mask.inference.live.frame_source import (
    DEFAULT_FPS,
    MAX_FPS,
    Frame,
    FrameSource,
    OnProblem,
    TimedFrame,
    check_fps,
)
from the_mask.inference.live.pictures import PICTURE_SUFFIXES, open_folder, open_picture

__all__ = ["DEFAULT_FPS", "Frame", "FrameSource", "OnProblem", "TimedFrame", "check_fps", "open_source"]
# After this many undecodable packets in a row, the source is given up.
MAX_BAD_PACKETS = 250


def open_source(
    source: str | Path | int,
    fps: float | Fraction | None = None,
    on_problem: OnProblem | None = None,
    square_pixels: bool = True,
) -> FrameSource:
    """Open a video file, a folder of frames, a picture, a camera (index) or a stream URL, and decode its first frame.

    If a path exists, it is used as a file or folder, whatever its name looks like.

    Args:
        source: path, URL, or camera index (an int, or a string of digits that is no path).
        fps: overrides the rate of the input, and the times it stores; folders have none of their own, default 15.
        on_problem: called with one line for each damaged part that is skipped or filled in, and when a file ends before
            the end that it announces. Without it damage that cannot be filled in raises a ValueError while iterating.
        square_pixels: enlarge anamorphic video, so that it looks as players show it; False gives the stored pixels.

    Raises:
        FileNotFoundError: no such file, folder or camera.
        ValueError: unreadable or empty video, video without a frame, folder without images, URL without an answer.
    """
    # Imported here: PyAV, which streams of arrays, cameras and pictures do not need.
    from the_mask.inference.live.video_file import open_video

    text, here = str(source), not isinstance(source, int)
    rate = None if fps is None else check_fps(fps)
    if here and os.path.isdir(text):
        return open_folder(Path(text), rate, on_problem)
    if here and os.path.isfile(text):
        path = Path(text)
        if not path.stat().st_size:
            raise ValueError(f"video {path} is empty (0 bytes)")
        if path.suffix.lower() in PICTURE_SUFFIXES:
            return open_picture(path, rate, on_problem)
        return open_video(str(path), rate, on_problem, MAX_BAD_PACKETS, square_pixels)
    if "://" in text:
        return open_video(text, rate, on_problem, MAX_BAD_PACKETS, square_pixels)
    if text.isdecimal():
        return _open_camera(int(text), rate)
    raise FileNotFoundError(f"input {text} is neither a video file, a folder of frames, nor a camera index (0, 1, ...)")


def _open_camera(index: int, fps: Fraction | None) -> FrameSource:
    # Imported here: 20 MB, for cameras alone.
    import cv2

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
    rate = fps or (check_fps(reported) if 0 < reported <= MAX_FPS else DEFAULT_FPS)
    return FrameSource(f"camera {index}", frames(), rate, None, capture.release, live=True)
