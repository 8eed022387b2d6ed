"""Clip-consistent augmentation: one geometry is drawn per clip and applied to all its frames.

Pure functions on numpy arrays; all randomness comes from the Generator passed in. Axes: H W pixels.
Images are uint8 [H,W,3] RGB, labels integer [H,W] of train ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The last crop is taken unchecked. The released code of Mask2Former and THE-Mask draws one more.
MAX_CROP_DRAWS = 10


@dataclass(frozen=True)
class Geometry:
    """What happens to every frame of a clip, in this order.

    Attributes:
        resized: (height, width) after scaling.
        crop: (top, left, height, width) in the scaled frame; never leaves it.
        flip: mirror left-right.
        padded: (height, width) after padding at the bottom and right.
    """

    resized: tuple[int, int]
    crop: tuple[int, int, int, int]
    flip: bool
    padded: tuple[int, int]

    @property
    def valid(self) -> tuple[int, int]:
        """(height, width) of the content before padding."""
        return self.crop[2], self.crop[3]


@dataclass(frozen=True)
class GeometryRange:
    """What :func:`sample_geometry` draws from.

    Attributes:
        box: (long edge, short edge) in pixels that the frame fits, ratio kept, at scale 1; 0 means no limit.
        scale: u ~ U[min, max] times the fitted size.
        crop: (height, width) of crop and padding; None keeps the scaled frame.
        max_category_share: redraw the crop while one class covers at least this share of its labelled pixels or is the
            only one; 1.0 takes the first draw.
        flip_prob: probability of mirroring.
    """

    box: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    crop: tuple[int, int] | None = None
    max_category_share: float = 1.0
    flip_prob: float = 0.5


def fit_size(height: int, width: int, box: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """Size that fits a (long edge, short edge) box times ``scale``, ratio kept, rounded, at least 1.

    An edge of 0 does not limit; with both 0 the native size is scaled.
    """
    limits = [edge / side for edge, side in zip(box, (max(height, width), min(height, width))) if edge > 0]
    factor = scale * min(limits, default=1.0)
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def round_up(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Both sides up to the next multiple."""
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resize to (height, width), pixel centres at +0.5, without antialiasing, as in the released code."""
    if image.shape[:2] == size:
        return image
    # Imported here: 20 MB that streams at the network's own size do not need.
    import cv2

    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def nearest_exact_index(source: int, target: int) -> np.ndarray:
    """Source index of each of ``target`` cells: the cell that holds the target's centre, floor((i+½)·source/target).

    This is PyTorch's ``nearest-exact`` in integer arithmetic; plain ``nearest`` is off by half a pixel.
    """
    return (2 * np.arange(target) + 1) * source // (2 * target)


def sample_geometry(
    rng: np.random.Generator, label: np.ndarray | None, size: tuple[int, int], ranges: GeometryRange, ignore_label: int
) -> Geometry:
    """Draw one geometry.

    Args:
        rng: source of all randomness.
        label: label map of the reference frame [H,W], on which crops are checked; None accepts the first crop.
        size: (H, W) of the frames.
        ranges: what to draw from.
        ignore_label: label that is not counted.
    """
    resized = fit_size(*size, ranges.box, rng.uniform(*ranges.scale))
    crop = (0, 0, *resized)
    padded = resized
    if ranges.crop is not None:
        padded = ranges.crop
        height, width = min(resized[0], padded[0]), min(resized[1], padded[1])
        for _ in range(MAX_CROP_DRAWS):
            top = int(rng.integers(resized[0] - height + 1))
            left = int(rng.integers(resized[1] - width + 1))
            crop = (top, left, height, width)
            if label is None or ranges.max_category_share >= 1.0:
                break
            if is_diverse(_crop_label(label, resized, crop), ranges.max_category_share, ignore_label):
                break
    return Geometry(resized, crop, bool(rng.random() < ranges.flip_prob), padded)


def is_diverse(label: np.ndarray, max_share: float, ignore_label: int) -> bool:
    """Whether a map has several classes, none of which covers ``max_share`` or more of the labelled pixels."""
    counts = np.bincount(label[label != ignore_label])
    counts = counts[counts > 0]
    return len(counts) > 1 and bool(counts.max() < max_share * counts.sum())


def _crop_label(label: np.ndarray, resized: tuple[int, int], crop: tuple[int, int, int, int]) -> np.ndarray:
    """Resize and crop in one step: nearest sampling needs only the cropped rows and columns."""
    top, left, height, width = crop
    rows = nearest_exact_index(label.shape[0], resized[0])[top : top + height]
    cols = nearest_exact_index(label.shape[1], resized[1])[left : left + width]
    return label[rows[:, None], cols]


def transform_label(label: np.ndarray, geometry: Geometry, ignore_label: int) -> np.ndarray:
    """Apply a geometry to a label map; padding is ``ignore_label``."""
    label = _crop_label(label, geometry.resized, geometry.crop)
    if geometry.flip:
        label = label[:, ::-1]
    (height, width), (full_h, full_w) = geometry.valid, geometry.padded
    return np.pad(label, ((0, full_h - height), (0, full_w - width)), constant_values=ignore_label)


def transform_image(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Apply a geometry to an image, except the padding: colours are changed before :func:`pad_image`."""
    top, left, height, width = geometry.crop
    image = resize_image(image, geometry.resized)[top : top + height, left : left + width]
    if geometry.flip:
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def pad_image(image: np.ndarray, size: tuple[int, int], fill: Sequence[int]) -> np.ndarray:
    """Pad at the bottom and right to (height, width) with the colour ``fill``."""
    if image.shape[:2] == size:
        return image
    padded = np.empty((*size, 3), image.dtype)
    padded[:] = np.asarray(fill, image.dtype)
    padded[: image.shape[0], : image.shape[1]] = image
    return padded


@dataclass(frozen=True)
class ColorJitter:
    """One drawn photometric distortion; the neutral value of a step leaves it out.

    Attributes:
        brightness: added, in grey levels.
        contrast: factor.
        contrast_first: contrast before saturation and hue, else after them.
        saturation: factor in HSV.
        hue: added to OpenCV's hue, which counts 0..179 for the full circle.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    contrast_first: bool = True
    saturation: float = 1.0
    hue: int = 0


def sample_color_jitter(rng: np.random.Generator) -> ColorJitter:
    """Draw a distortion with the ranges of the released code: ±32, 0.5–1.5, 0.5–1.5, ±18, each with probability ½."""
    use = rng.random(4) < 0.5
    brightness, contrast, saturation = rng.uniform(-32, 32), rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.5)
    contrast_first, hue = bool(rng.random() < 0.5), int(rng.integers(-18, 19))
    return ColorJitter(
        brightness=brightness if use[0] else 0.0,
        contrast=contrast if use[1] else 1.0,
        contrast_first=contrast_first,
        saturation=saturation if use[2] else 1.0,
        hue=hue if use[3] else 0,
    )


def _table(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)


def apply_color_jitter(image: np.ndarray, jitter: ColorJitter) -> np.ndarray:
    """Apply brightness, contrast (first or last), saturation and hue; round and clip to 0..255 after each step."""
    import cv2  # as in resize_image

    grey = np.arange(256.0)
    before = _table(grey + jitter.brightness)
    contrast = _table(grey * jitter.contrast)
    if jitter.contrast_first:
        before = contrast[before]
    if jitter.brightness or (jitter.contrast_first and jitter.contrast != 1):
        image = cv2.LUT(image, before)
    if jitter.saturation != 1 or jitter.hue:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        tables = [(grey + jitter.hue) % 180, (grey * jitter.saturation).round().clip(0, 255), grey]
        image = cv2.cvtColor(cv2.LUT(hsv, np.stack(tables, -1).astype(np.uint8)[None]), cv2.COLOR_HSV2RGB)
    if not jitter.contrast_first and jitter.contrast != 1:
        image = cv2.LUT(image, contrast)
    return image
