"""Picture files: frames, label maps and animations are read with errors that name the file, and written whole.

All of the library reads pictures through this module, so formats, the limit on pixels, bit depths and EXIF orientation
are handled the same everywhere.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from the_mask.data.classes import ILLEGAL, ExplainValues, as_label_table
from the_mask.data.files import atomic_write

# The formats that Pillow may try on a file, whatever its suffix; its other parsers are never run.
FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
ANIMATED_FORMATS = (*FORMATS, "GIF")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_EXIF_ORIENTATION = 0x0112
# Raised by Pillow's decoders for damaged files (PNG chunks: SyntaxError; TIFF and GIF headers: the last four).
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, struct.error, OverflowError)


class _Stored(NamedTuple):
    """How a file stores pixels: bits per sample (0: those of the mode), whether 0 is white (TIFF), EXIF orientation."""

    bits: int
    inverted: bool
    orientation: int


@contextmanager
def _opened(path: str | Path, what: str, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """Open an image file and read its header. Errors, also those inside the ``with`` block, name the file."""
    try:
        with Image.open(path, formats=formats) as image:
            yield image
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what} {path} does not exist") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{what} {path} is too large: {error} For files that you trust set PIL.Image.MAX_IMAGE_PIXELS, e.g. in a "
            "module that DATASETS.IMPORT names"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{what} {path} cannot be read, it is truncated or not an image of a known format ({', '.join(formats)})"
        ) from error
    except _PILLOW_ERRORS as error:
        raise ValueError(f"{what} {path} cannot be read, it is truncated or not an image: {error}") from error


def _load(path: str | Path, what: str) -> tuple[Image.Image, _Stored]:
    """Decode a whole image file and turn it upright."""
    with _opened(path, what) as image:
        count = _count(image)
        if count == 1:
            stored = _stored(image)
            image.load()
            # A PNG may hold the tag after its pixels.
            stored = stored._replace(orientation=_orientation(image))
            ImageOps.exif_transpose(image, in_place=True)
            return image, stored
    raise ValueError(f"{what} {path} holds {count} pictures; expected one, so write each to a file of its own")


def _count(image: Image.Image) -> int:
    # The second picture of a phone's JPEG is a thumbnail or a gain map.
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def _stored(image: Image.Image) -> _Stored:
    """Read from Pillow's raw mode, such as "L;4" or "RGB;16B"; only known before the pixels are decoded."""
    tiles = getattr(image, "tile", [])  # of files only
    arguments = tiles[0][3] if tiles else ""
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    # "BGR;16" (BMP) has 15 or 16 bits per pixel, not per sample.
    suffix = raw.partition(";")[2] if isinstance(raw, str) and not raw.startswith("BGR") else ""
    digits = "".join(c for c in suffix if c.isdecimal())
    return _Stored(int(digits or 0), suffix.endswith("I"), 1)


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(_EXIF_ORIENTATION, 1)
    return value if value in range(2, 9) else 1


def read_image(path: str | Path) -> np.ndarray:
    """Read an image as RGB uint8 [H,W,3], turned upright by its EXIF tag. Grey is repeated, transparency dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, not an image, several images, above Pillow's limit of pixels, or more than 8 bits per
            channel (cameras store 10 to 16 bits in 16, so the file does not say which value is white).
    """
    return read_image_and_orientation(path)[0]


def read_image_and_orientation(path: str | Path) -> tuple[np.ndarray, int]:
    """:func:`read_image`, and the EXIF orientation it was turned by (1 for none)."""
    image, stored = _load(path, "image")
    return _rgb(image, stored, path), stored.orientation


def _rgb(image: Image.Image, stored: _Stored, path: str | Path) -> np.ndarray:
    if stored.bits > 8 or image.mode in _WIDE_MODES:
        bits = f" with {stored.bits} bits per channel" if image.mode not in _WIDE_MODES else ""
        raise ValueError(
            f"image {path} has mode {image.mode}{bits}; convert it to 8 bits per channel, "
            "with what is white in it (4095, 65535, ...) at 255"
        )
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def write_picture(path: str | Path, pixels: np.ndarray, *, durable: bool = True, **options: Any) -> None:
    """Write a picture whole or not at all; the folder is made if needed.

    Args:
        path: its suffix is that of a format that Pillow writes.
        pixels: uint8 [H,W,3], or uint8 or uint16 [H,W].
        durable: see :func:`the_mask.data.files.atomic_write`.
        options: of Pillow's writer, such as ``quality``.

    Raises:
        ValueError: no such format.
        OSError: names the file.
    """
    path = Path(path)
    form = Image.registered_extensions().get(path.suffix.lower())
    if form is None:
        raise ValueError(f"picture {path}: unknown suffix {path.suffix!r}; expected one of {', '.join(IMAGE_SUFFIXES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    atomic_write(path, lambda stream: picture.save(stream, format=form, **options), durable)


def read_size(path: str | Path) -> tuple[int, int]:
    """Height and width of a picture as :func:`read_image` gives it, from its header.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_image`; damage behind the header is not seen.
    """
    with _opened(path, "image") as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def exif_orientation(path: str | Path) -> int:
    """The EXIF orientation of an image file: 1 as it is stored, 2 to 8 mirrored or turned.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_image`.
    """
    with _opened(path, "image") as image:
        return _orientation(image)


def animation(path: str | Path) -> Iterator[tuple[np.ndarray, float]]:
    """Frames of an animated GIF, WebP or PNG, or pages of a TIFF: RGB uint8 [H,W,3] and seconds shown.

    A file with one picture yields that one. Without a stored duration the seconds are 0.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_image`, also after some pictures.
    """
    with _opened(path, "animation", ANIMATED_FORMATS) as image:
        for picture in ImageSequence.Iterator(image):
            stored = _stored(picture)
            picture.load()
            yield _rgb(ImageOps.exif_transpose(picture), stored, path), picture.info.get("duration", 0) / 1000


def count_pictures(path: str | Path) -> int:
    """Number of pictures in an image file: more than one for animations. A phone's second view is not counted.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_image`.
    """
    with _opened(path, "image", ANIMATED_FORMATS) as image:
        return _count(image)


def read_label_raw(path: str | Path) -> np.ndarray:
    """Read a mask as its stored integers, uint8 or int32 [H,W]: greyscale (1 to 16 bits) or palette indices.

    Turned upright by an EXIF tag of its own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, not an image, several images, above Pillow's limit of pixels, or a colour image.
    """
    return read_label_and_orientation(path)[0]


def read_embedded_mask(content: bytes, where: str, size: tuple[int, int]) -> np.ndarray:
    """Read a PNG that stands inside another file as a mask: bool [H,W], True where it is not black.

    Args:
        content: the bytes of the PNG.
        where: the file and place it came from, for messages.
        size: the height and width that it must have; nothing larger is decoded.

    Raises:
        ValueError: it cannot be decoded, or has another size. Names ``where``.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if image.size != size[::-1]:
                raise ValueError(f"{image.width}x{image.height} pixels, expected {size[1]}x{size[0]}")
            return np.asarray(image.convert("L")) > 0
    except (*_PILLOW_ERRORS, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: a mask cannot be read: {error}") from error


def read_palette(path: str | Path) -> list[tuple[int, int, int]]:
    """Colours (r, g, b) of a palette image; an empty list for other images."""
    with _opened(path, "mask") as image:
        values = image.getpalette() or []
    return [(values[i], values[i + 1], values[i + 2]) for i in range(0, len(values) - 2, 3)]


def read_label_and_orientation(path: str | Path) -> tuple[np.ndarray, int]:
    """:func:`read_label_raw`, and the EXIF orientation it was turned by (1 for none)."""
    image, stored = _load(path, "mask")
    if image.mode not in (*_WIDE_MODES[:-1], "P", "1", "L"):
        raise ValueError(
            f"mask {path} has mode {image.mode}; expected one channel of class ids (8-bit, 16-bit or palette); "
            "masks of colours are for `the-mask import --format colors`"
        )
    return _class_ids(image, stored), stored.orientation


def _class_ids(image: Image.Image, stored: _Stored) -> np.ndarray:
    if image.mode in _WIDE_MODES:
        return np.array(image).astype(np.int32)
    values = np.array(image).astype(np.uint8, copy=False)
    if image.mode == "P":
        return values
    white = 1 if image.mode == "1" else 255
    if stored.inverted:
        values = white - values
    # Pillow spreads 2 and 4 bits over 0..255.
    return values // (white // (2**stored.bits - 1)) if stored.bits in (2, 4) else values


def _checked(label_table: Sequence[int]) -> tuple[int, ...]:
    # Tables of a registered data set are tuples; others come from metadata that user code may have filled.
    return label_table if isinstance(label_table, tuple) else as_label_table(label_table)


@lru_cache(maxsize=32)
def _lookup(label_table: tuple[int, ...]) -> np.ndarray:
    """The label table as an array over all 16-bit values."""
    table = np.full(65536, ILLEGAL, np.int32)
    table[: len(label_table)] = label_table
    return table


def illegal_values(raw: np.ndarray, label_table: Sequence[int]) -> list[int]:
    """Values of a raw mask that the table does not allow, ascending."""
    table = _lookup(_checked(label_table))
    return [int(v) for v in np.unique(raw) if not 0 <= v < len(table) or table[v] == ILLEGAL]


def apply_label_table(
    raw: np.ndarray, label_table: Sequence[int], path: str | Path = "", explain: ExplainValues | None = None
) -> np.ndarray:
    """Translate a raw mask into train ids: uint8 [H,W], or int32 when the table holds ids above 255.

    Raises:
        ValueError: a value that the table does not allow; names ``path``, the values and the explanation of
            ``explain``.
    """
    table = _lookup(_checked(label_table))
    inside = raw.size == 0 or (int(raw.min()) >= 0 and int(raw.max()) < len(table))
    label = table[raw] if inside else None
    if label is None or (label == ILLEGAL).any():
        allowed = [v for v, t in enumerate(label_table) if t != ILLEGAL]
        text = f"mask {path} holds label values {illegal_values(raw, label_table)}; allowed: {_spans(allowed)}"
        cause = explain(np.unique(raw).tolist(), 1) if explain is not None else ""
        raise ValueError(f"{text}. {cause}" if cause else text)
    return label if max(label_table) > 255 else label.astype(np.uint8)


def read_label(path: str | Path, label_table: Sequence[int], explain: ExplainValues | None = None) -> np.ndarray:
    """Read a mask as train ids; see :func:`read_label_raw` and :func:`apply_label_table`."""
    return apply_label_table(read_label_raw(path), label_table, path, explain)


def check_same_size(image: np.ndarray, label: np.ndarray, image_path: str | Path, label_path: str | Path) -> None:
    """Raise ValueError unless image [H,W,3] and label [H,W] have one size; names both files, and EXIF if it is why."""
    if image.shape[:2] != label.shape:
        swapped = image.shape[1::-1] == label.shape and Path(image_path).is_file() and Path(label_path).is_file()
        turned = exif_problem(exif_orientation(image_path), exif_orientation(label_path)) if swapped else ""
        raise ValueError(
            f"image {image_path} is {image.shape[0]}x{image.shape[1]} (height x width) but mask {label_path} is "
            f"{label.shape[0]}x{label.shape[1]}; they must match{f'. {turned}' if turned else ''}"
        )


def exif_problem(image_orientation: int, label_orientation: int) -> str:
    """The message for an image and a mask with different EXIF orientations; "" for equal ones."""
    if image_orientation == label_orientation:
        return ""
    return (
        f"EXIF orientation {image_orientation} turns or mirrors the image, the mask has {label_orientation}: a mask "
        "that was drawn on the stored pixels does not fit. Store the image upright and without the tag, or give the "
        "mask the same tag"
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
