"""Clips made from one image by an affine motion, so that temporal models can learn from images.

Pure functions. Axes: H W pixels. A point is (x, y) with pixel centres at whole numbers, as in OpenCV. The motion is
uniform: the frame at offset o from the reference is moved by the share o / (largest offset) of it. Frames before the
reference move the other way, and the reference itself is the unchanged image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class MotionRange:
    """Largest motion of the frame farthest from the reference.

    Attributes:
        shift: share of the image's width and height.
        rotation, shear: degrees.
        zoom: factor between 1/(1 + zoom) and 1 + zoom.
    """

    shift: float = 0.05
    rotation: float = 5.0
    shear: float = 3.0
    zoom: float = 0.1

    def __post_init__(self) -> None:
        limits = {"SHIFT": (self.shift, 1.0), "ROTATION": (self.rotation, 180.0), "SHEAR": (self.shear, 80.0)}
        limits["ZOOM"] = (self.zoom, 9.0)
        for name, (value, largest) in limits.items():
            if not 0 <= value <= largest:
                raise ValueError(f"INPUT.PSEUDO_CLIP.MAX_{name} {value}: expected a number in 0..{largest:g}")


@dataclass(frozen=True)
class Motion:
    """A drawn motion: shift in shares of width and height, rotation and shear in radians, logarithm of the zoom."""

    shift: tuple[float, float]
    rotation: float
    shear: float
    log_zoom: float


def sample_motion(rng: np.random.Generator, ranges: MotionRange) -> Motion:
    """Draw each part uniformly from its range (the zoom in its logarithm)."""
    draws = rng.uniform(-1, 1, 5)
    return Motion(
        shift=(ranges.shift * draws[0], ranges.shift * draws[1]),
        rotation=math.radians(ranges.rotation) * draws[2],
        shear=math.radians(ranges.shear) * draws[3],
        log_zoom=math.log1p(ranges.zoom) * draws[4],
    )


def forward_matrix(motion: Motion, share: float, height: int, width: int) -> np.ndarray:
    """Matrix of a share (-1..1) of a motion: float64 [2,3], maps (x, y, 1) in the image to (x, y) in the frame.

    About the image's centre: shear along x, rotation, zoom; then the shift.
    """
    angle, zoom = share * motion.rotation, math.exp(share * motion.log_zoom)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = zoom * rotation @ np.array([[1.0, math.tan(share * motion.shear)], [0.0, 1.0]])
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    shift = share * np.array([motion.shift[0] * width, motion.shift[1] * height])
    return np.column_stack([linear, centre + shift - linear @ centre])


def inverse_matrix(matrix: np.ndarray) -> np.ndarray:
    """Inverse of an affine matrix [2,3]."""
    linear = np.linalg.inv(matrix[:, :2])
    return np.column_stack([linear, -linear @ matrix[:, 2]])


def warp_image(image: np.ndarray, source: np.ndarray, fill: Sequence[int]) -> np.ndarray:
    """Bilinear warp of uint8 [H,W,3]; ``source`` [2,3] maps a point of the result to one of the image."""
    size = (image.shape[1], image.shape[0])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, source, size, flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=tuple(fill))


def warp_label(label: np.ndarray, source: np.ndarray, ignore_label: int) -> np.ndarray:
    """Nearest warp of an integer map [H,W]; pixels from outside become ``ignore_label``."""
    height, width = label.shape
    x, y = np.arange(width), np.arange(height)[:, None]
    columns, rows = (np.floor(a * x + b * y + c + 0.5).astype(np.int64) for a, b, c in source)
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    warped = np.full_like(label, ignore_label)
    warped[inside] = label[rows[inside], columns[inside]]
    return warped


def pseudo_clip(
    image: np.ndarray,
    label: np.ndarray,
    offsets: Sequence[int],
    motion: Motion,
    fill: Sequence[int],
    ignore_label: int,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Frames and labels of a clip made from one image.

    Args:
        image: uint8 [H,W,3].
        label: [H,W] train ids, of a type that holds ``ignore_label``.
        offsets: of the frames from the reference (0), which is among them.
        motion: that of the frame with the largest offset.
        fill: colour of pixels that the image does not cover.
        ignore_label: label of pixels that the image does not cover.
    """
    largest = max(1, *(abs(offset) for offset in offsets))
    images, labels = [], []
    for offset in offsets:
        if offset == 0:
            images.append(image)
            labels.append(label)
            continue
        source = inverse_matrix(forward_matrix(motion, offset / largest, *label.shape))
        images.append(warp_image(image, source, fill))
        labels.append(warp_label(label, source, ignore_label))
    return images, labels
