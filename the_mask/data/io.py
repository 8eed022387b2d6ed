"""Reading images and label maps, with errors that name the file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from the_mask.data.classes import ILLEGAL, ExplainValues

_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


def _open(path: str | Path, what: str) -> Image.Image:
    """Decode a whole image file."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what} {path} does not exist") from error
    # PIL reports broken files as OSError, SyntaxError (PNG chunks), ValueError or EOFError, depending on the decoder.
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"{what} {path} cannot be read, it is truncated or not an image: {error}") from error


def read_image(path: str | Path) -> np.ndarray:
    """An image as RGB uint8 [H,W,3], turned upright by its EXIF tag. Greyscale is repeated, transparency dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, not an image, or more than 8 bits per channel.
    """
    image = _open(path, "image")
    if image.mode in _WIDE_MODES:
        raise ValueError(f"image {path} has mode {image.mode}; convert it to 8 bits per channel")
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def read_label_raw(path: str | Path) -> np.ndarray:
    """A mask as its stored integers, uint8 or int32 [H,W]: greyscale (8 or 16 bits) or palette indices.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, not an image, or a colour image.
    """
    image = _open(path, "mask")
    if image.mode in ("L", "P"):
        return np.array(image)
    if image.mode in _WIDE_MODES[:-1]:
        return np.array(image).astype(np.int32)
    if image.mode == "1":
        return np.array(image).astype(np.uint8)
    raise ValueError(f"mask {path} has mode {image.mode}; expected one channel of class ids (8-bit, 16-bit or palette)")


@lru_cache(maxsize=32)
def _lookup(label_table: tuple[int, ...]) -> np.ndarray:
    """Table over all 16-bit values."""
    table = np.full(65536, ILLEGAL, np.int32)
    table[: len(label_table)] = label_table
    return table


def illegal_values(raw: np.ndarray, label_table: Sequence[int]) -> list[int]:
    """Values of a raw mask that the table does not allow, ascending."""
    table = _lookup(tuple(label_table))
    return [int(v) for v in np.unique(raw) if not 0 <= v < len(table) or table[v] == ILLEGAL]


def apply_label_table(
    raw: np.ndarray, label_table: Sequence[int], path: str | Path = "", explain: ExplainValues | None = None
) -> np.ndarray:
    """Train ids of a raw mask: uint8 [H,W], or int32 when the table holds ids above 255.

    Raises:
        ValueError: a value the table does not allow; names ``path`` and the values, and what ``explain`` says of them.
    """
    table = _lookup(tuple(label_table))
    inside = raw.size == 0 or (int(raw.min()) >= 0 and int(raw.max()) < len(table))
    label = table[raw] if inside else None
    if label is None or (label == ILLEGAL).any():
        allowed = [v for v, t in enumerate(label_table) if t != ILLEGAL]
        text = f"mask {path} holds label values {illegal_values(raw, label_table)}; allowed: {_spans(allowed)}"
        cause = explain(np.unique(raw).tolist(), 1) if explain is not None else ""
        raise ValueError(f"{text}. {cause}" if cause else text)
    return label if max(label_table) > 255 else label.astype(np.uint8)


def read_label(path: str | Path, label_table: Sequence[int], explain: ExplainValues | None = None) -> np.ndarray:
    """A mask as train ids, see :func:`read_label_raw` and :func:`apply_label_table`."""
    return apply_label_table(read_label_raw(path), label_table, path, explain)


def check_same_size(image: np.ndarray, label: np.ndarray, image_path: str | Path, label_path: str | Path) -> None:
    """Raise ValueError unless image [H,W,3] and label [H,W] have one size; names both files."""
    if image.shape[:2] != label.shape:
        raise ValueError(
            f"image {image_path} is {image.shape[0]}x{image.shape[1]} (height x width) but mask {label_path} is "
            f"{label.shape[0]}x{label.shape[1]}; they must match"
        )


def _spans(values: list[int]) -> str:
    """``[0, 1, 2, 255]`` as ``0..2, 255``."""
    spans: list[list[int]] = []
    for value in values:
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return ", ".join(f"{a}..{b}" if a < b else f"{a}" for a, b in spans)
