"""Reading and writing the images evaluation needs: frames, label maps as PNGs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

# PIL modes whose pixels are class ids: grey, palette index, 16 bit and 32 bit grey.
_LABEL_MODES = ("L", "P", "I;16", "I;16B", "I")


def read_rgb(path: str | Path) -> NDArray[np.uint8]:
    """Read an image as uint8 RGB [H, W, 3], turned upright.

    Raises:
        FileNotFoundError, ValueError: missing; unreadable or truncated. The file is named.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image {path} does not exist") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error


def read_label_image(path: str | Path) -> NDArray[np.integer]:
    """Read a label PNG as stored: raw values [H, W], uint8 or wider.

    Raises:
        FileNotFoundError, ValueError: missing; unreadable, truncated, or a colour image. The file is named.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in _LABEL_MODES:
                raise ValueError(
                    f"{path} is an image of mode {image.mode}; a label map has one channel of class ids {_LABEL_MODES}"
                )
            return np.asarray(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"label map {path} does not exist") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"label map {path} cannot be read: {error}") from error


def decode_labels(
    raw: NDArray[np.integer], label_table: Sequence[int], source: str | Path = "label map"
) -> NDArray[np.integer]:
    """Raw PNG values -> train ids by a table whose entry -1 (and whose end) marks illegal values.

    Raises:
        ValueError: illegal values; they, their pixel counts and ``source`` are named.
    """
    table = np.asarray(label_table, dtype=np.int32)
    values, counts = np.unique(raw, return_counts=True)
    illegal = [
        f"{value} ({count} px)"
        for value, count in zip(values.tolist(), counts.tolist(), strict=True)
        if not 0 <= value < len(table) or table[value] < 0
    ]
    if illegal:
        legal = _ranges(np.flatnonzero(table >= 0).tolist())
        raise ValueError(f"{source} holds illegal label values {', '.join(illegal)}; allowed: {legal}")
    dtype = np.uint8 if table.size == 0 or table.max() <= 255 else np.int32
    return table[raw].astype(dtype)


def raw_values_of_classes(label_table: Sequence[int], num_classes: int) -> list[int]:
    """For each train id the lowest raw PNG value that stands for it: the inverse of a label table.

    Raises:
        ValueError: a class has no raw value.
    """
    first: dict[int, int] = {}
    for raw, train_id in enumerate(label_table):
        first.setdefault(train_id, raw)
    missing = [train_id for train_id in range(num_classes) if train_id not in first]
    if missing:
        raise ValueError(f"the label table has no raw value for train ids {missing}")
    return [first[train_id] for train_id in range(num_classes)]


def save_label_map(path: Path, labels: NDArray[np.integer], raw_values: Sequence[int]) -> None:
    """Write train ids [H, W] as a one-channel PNG of raw values: 8 bit where they fit, else 16 bit."""
    table = np.asarray(raw_values, dtype=np.uint8 if max(raw_values) <= 255 else np.uint16)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(table[labels]).save(path)


def _ranges(values: Sequence[int]) -> str:
    """``[0, 1, 2, 255]`` -> ``0..2, 255``."""
    parts: list[list[int]] = []
    for value in values:
        if parts and value == parts[-1][1] + 1:
            parts[-1][1] = value
        else:
            parts.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in parts)
