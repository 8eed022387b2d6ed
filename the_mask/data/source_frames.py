"""Frames between labelled frames, decoded from the source video.

The labelled images verify the video and its frame numbers: each must be more similar to the
decoded frame of its own number than to the neighbours of that frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from the_mask.data.io import read_image

# Offsets of decoded frames that a labelled image is compared with.
OFFSETS = range(-3, 4)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images of one shape, in dB; infinite for equal ones."""
    error = float(np.square(first.astype(np.float32) - second.astype(np.float32)).mean(dtype=np.float64))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def shrink(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize [H,W,3] to (height, width) by averaging areas."""
    if image.shape[:2] == size:
        return image
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA)


def memory_numbers(labelled: Iterable[int], memory: int) -> list[int]:
    """Numbers of the ``memory`` frames before each labelled one, excluding labelled frames and negative numbers."""
    labelled = set(labelled)
    wanted = {number - k for number in labelled for k in range(1, memory + 1)}
    return sorted(number for number in wanted - labelled if number >= 0)


def consecutive_runs(numbers: Iterable[int]) -> list[list[int]]:
    """Split numbers into ascending runs without gaps."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def walk_video(
    frames: Iterable[np.ndarray],
    first_number: int,
    images: Mapping[int, Path],
    wanted: Iterable[int],
    use: Callable[[int, np.ndarray], None],
) -> dict[int, dict[int, float]]:
    """Decode a video once: pass on the wanted frames, and compare labelled images with the frames around them.

    Args:
        frames: decoded frames, RGB uint8, from the start of the video; only as many as needed are taken.
        first_number: frame number of the first one.
        images: labelled images by frame number.
        wanted: numbers of the frames to pass on.
        use: called with number and frame.

    Returns:
        PSNR by labelled number and offset of the decoded frame, for the offsets that exist in the video.
    """
    wanted = set(wanted)
    last = max([*wanted, *(number + OFFSETS[-1] for number in images)])
    scores: dict[int, dict[int, float]] = {number: {} for number in images}
    labelled = lru_cache(maxsize=2 * len(OFFSETS))(lambda number: read_image(images[number]))
    for number, frame in enumerate(frames, first_number):
        if number in wanted:
            use(number, frame)
        for offset in OFFSETS:
            if number - offset in images:
                image = labelled(number - offset)
                scores[number - offset][offset] = psnr(image, shrink(frame, image.shape[:2]))
        if number >= last:
            break
    return scores


def alignment_problem(scores: Mapping[int, Mapping[int, float]]) -> tuple[str, int | None]:
    """The problem in a result of :func:`walk_video` ("" if none), and the offset that would fix it, if any.

    Every labelled image must be most similar to the frame of its own number. Offsets count decoded frames: +1 means
    that the image is the video's next frame.
    """
    absent = [number for number, found in scores.items() if 0 not in found]
    if absent:
        return f"the video does not reach {len(absent)} labelled frames, the first is {min(absent)}", None
    best = {number: max(found, key=lambda offset: (found[offset], -abs(offset))) for number, found in scores.items()}
    wrong = {number: offset for number, offset in best.items() if offset != 0}
    if not wrong:
        return "", None
    number, offset = next(iter(wrong.items()))
    found = scores[number]
    text = (
        f"{len(wrong)} of {len(best)} labelled images are more like another frame of the video than their own; e.g. "
        f"frame {number}: {found[0]:.1f} dB at offset 0, {found[offset]:.1f} dB at offset {offset:+d}"
    )
    return text, offset if set(best.values()) == {offset} else None
