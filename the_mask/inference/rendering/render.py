"""Pictures of segmentations: overlay, legend, panels side by side, contact sheet.

Pictures are uint8 arrays [H, W, 3], RGB; label maps are integer arrays [H, W] of train ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
Labels = NDArray[np.integer]
Color = tuple[int, int, int]

BACKGROUND: Color = (24, 26, 30)
TEXT: Color = (232, 234, 237)
FAINT: Color = (150, 154, 160)


@dataclass(frozen=True)
class Palette:
    """Names and colours of the classes.

    Attributes:
        names: index = train id.
        colors: (r, g, b) per class, 0..255.
        ignore_label: label of pixels without a class.
    """

    names: Sequence[str]
    colors: Sequence[Sequence[int]]
    ignore_label: int = 255

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colors):
            raise ValueError(f"{len(self.names)} class names, but {len(self.colors)} colours")

    def table(self) -> Picture:
        """Colours of all labels, uint8 [max label + 1, 3]; labels that are not a class are black."""
        table = np.zeros((max(self.ignore_label, len(self.colors)) + 1, 3), dtype=np.uint8)
        table[: len(self.colors)] = np.asarray(self.colors, dtype=np.uint8).reshape(-1, 3)
        return table


def colorize(labels: Labels, palette: Palette) -> Picture:
    """Paint a label map in class colours; ignored pixels are black.

    Raises:
        ValueError: a label that is neither a class nor the ignore label.
    """
    table = palette.table()
    counts = _byte_counts(labels)
    values = np.unique(labels) if counts is None else np.flatnonzero(counts)
    strange = [int(v) for v in values if not 0 <= v < len(palette.colors) and v != palette.ignore_label]
    if strange:
        raise ValueError(
            f"labels {strange} have no colour; allowed: 0..{len(palette.colors) - 1} and {palette.ignore_label}"
        )
    if counts is None:
        return table[labels]
    of_bytes = np.zeros((256, 1, 3), np.uint8)
    of_bytes[: len(table), 0] = table[:256]
    return cv2.applyColorMap(np.ascontiguousarray(labels), of_bytes).astype(np.uint8, copy=False)


def _byte_counts(labels: Labels) -> NDArray[np.int64] | None:
    """Counts of the values 0..255 in a uint8 map; None for other types. Much faster than sorting."""
    if labels.dtype != np.uint8 or not labels.size:
        return None
    # Float32 is exact up to 16.7 million pixels of a class.
    return cv2.calcHist([np.ascontiguousarray(labels)], [0], None, [256], [0, 256]).ravel().astype(np.int64)


def overlay(image: Picture, labels: Labels, palette: Palette, alpha: float = 0.55, borders: bool = True) -> Picture:
    """Blend the class colours over a frame.

    Args:
        image: the frame.
        labels: its label map; resized (nearest) if its size differs from the frame's. Ignored pixels are unchanged.
        alpha: 0 shows the frame only, 1 the colours only.
        borders: draw a thin dark line between classes.

    Raises:
        ValueError: alpha outside 0..1, or labels without a colour.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha}: expected 0 (frame only) to 1 (colours only)")
    height, width = image.shape[:2]
    if labels.shape != (height, width):
        labels = resize_labels(labels, height, width)
    mixed = colorize(labels, palette)
    # Ignored pixels get their own colour, so that blending does not change them. All in one array, to save allocations.
    ignored = np.flatnonzero(labels == palette.ignore_label)
    flat = mixed.reshape(-1, 3)
    flat[ignored] = image.reshape(-1, 3)[ignored]
    cv2.addWeighted(image, 1 - alpha, mixed, alpha, 0, dst=mixed)
    if borders and alpha > 0:
        border = np.flatnonzero(class_borders(labels))
        flat[border] = (flat[border] * (1 - 0.6 * alpha)).round()
    return mixed


def hatch(image: Picture, where: NDArray[np.bool_], period: int = 7, strength: float = 0.75) -> Picture:
    """Draw white diagonal lines over the pixels ``where`` [h, w]; resized (nearest) to the picture's size.

    Used to mark wrong pixels, which class colours alone do not show.
    """
    height, width = image.shape[:2]
    if where.shape != (height, width):
        where = resize_labels(where.astype(np.uint8), height, width).astype(bool)
    rows, columns = np.indices((height, width))
    lines = where & ((rows + columns) % period < 2)
    return np.where(lines[..., None], (1 - strength) * image + strength * 255.0, image).round().astype(np.uint8)


def class_borders(labels: Labels) -> NDArray[np.bool_]:
    """Pixels [H, W] whose right or lower neighbour has another label."""
    border = np.zeros(labels.shape, dtype=bool)
    border[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    border[:-1] |= labels[:-1] != labels[1:]
    return border


def resize_labels(labels: Labels, height: int, width: int) -> Labels:
    """Nearest-neighbour resize by pixel centres."""
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(np.intp)
    return labels[rows[:, None], columns]


def enlarge(image: Picture, factor: int) -> Picture:
    """Enlarge by a whole factor (next to text, small frames would be unreadable)."""
    if factor == 1:
        return image
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC).astype(np.uint8, copy=False)


def present_classes(labels: Labels, num_classes: int, min_share: float = 0.0) -> list[int]:
    """Train ids that cover more than ``min_share`` of a label map, ascending."""
    counts = _byte_counts(labels)
    if counts is None:
        counts = np.bincount(labels[labels < num_classes].ravel(), minlength=num_classes)
    counts = counts[:num_classes]
    return [int(c) for c in np.flatnonzero(counts > min_share * labels.size)]


def legend_column(classes: Sequence[int], palette: Palette, height: int, width: int, text_size: int = 14) -> Picture:
    """Swatches and names of ``classes`` in a column; those that do not fit are counted in the last line."""
    canvas, draw = _canvas(height, width)
    font = _font(text_size)
    row, margin = round(text_size * 1.65), text_size // 2
    rows = max(1, (height - margin) // row)
    shown = list(classes) if len(classes) <= rows else list(classes)[: rows - 1]
    for number, class_id in enumerate(shown):
        _legend_entry(draw, margin, margin + number * row, width - 2 * margin, class_id, palette, font)
    if len(shown) < len(classes):
        rest = f"+ {len(classes) - len(shown)} more"
        draw.text((margin, margin + len(shown) * row + row / 2), rest, FAINT, font, anchor="lm")
    return np.asarray(canvas)


def legend_rows(classes: Sequence[int], palette: Palette, width: int, text_size: int = 14, note: str = "") -> Picture:
    """Swatches and names of ``classes`` in as many rows as needed, then a note; to be placed below a picture."""
    font = _font(text_size)
    row, margin = round(text_size * 1.65), text_size // 2
    places: list[tuple[int, int]] = []
    x = y = margin
    widths = [_entry_width(palette.names[class_id], font) for class_id in classes]
    for needed in [*widths, *([round(font.getlength(note))] if note else [])]:
        needed = min(needed, width - 2 * margin)
        if x > margin and x + needed > width - margin:
            x, y = margin, y + row
        places.append((x, y))
        x += needed + text_size
    canvas, draw = _canvas(y + row + margin, width)
    for class_id, (x, y) in zip(classes, places):
        _legend_entry(draw, x, y, width - margin - x, class_id, palette, font)
    if note:
        x, y = places[-1]
        draw.text((x, y + 0.75 * _swatch(font)), _fitted(note, width - margin - x, font), FAINT, font, anchor="lm")
    return np.asarray(canvas)


def titled(image: Picture, title: str, text_size: int = 16) -> Picture:
    """A picture with its title in a bar above; a long title is cut with an ellipsis."""
    canvas, draw = _canvas(round(text_size * 1.9), image.shape[1])
    font = _font(text_size)
    text = _fitted(title, image.shape[1] - text_size, font)
    draw.text((image.shape[1] / 2, canvas.height / 2), text, TEXT, font, anchor="mm")
    return np.concatenate([np.asarray(canvas), image])


def side_by_side(
    images: Sequence[Picture], titles: Sequence[str] | None = None, gap: int = 6, text_size: int = 16
) -> Picture:
    """Pictures of the same height next to each other, each with its title above.

    Raises:
        ValueError: no picture, different heights, or another number of titles.
    """
    if not images or (titles is not None and len(titles) != len(images)):
        raise ValueError(f"{len(images)} pictures and {len(titles or ())} titles: expected as many, at least one")
    if len({image.shape[0] for image in images}) > 1:
        raise ValueError(f"pictures side by side need one height, got {[image.shape[0] for image in images]}")
    if titles is not None:
        images = [titled(image, title, text_size) for image, title in zip(images, titles, strict=True)]
    spacer = np.full((images[0].shape[0], gap, 3), BACKGROUND, dtype=np.uint8)
    return np.concatenate([part for image in images for part in (spacer, image)][1:], axis=1)


def stack_rows(rows: Sequence[Picture], gap: int = 6) -> Picture:
    """Pictures below each other, padded on the right to the widest."""
    width = max(row.shape[1] for row in rows)
    parts: list[Picture] = []
    for row in rows:
        if parts:
            parts.append(np.full((gap, width, 3), BACKGROUND, dtype=np.uint8))
        padded = np.full((row.shape[0], width, 3), BACKGROUND, dtype=np.uint8)
        padded[:, : row.shape[1]] = row
        parts.append(padded)
    return np.concatenate(parts)


def contact_sheet(
    cells: Sequence[Sequence[Picture]],
    column_titles: Sequence[str] | None = None,
    row_titles: Sequence[str] | None = None,
    footer: Picture | None = None,
    gap: int = 6,
    text_size: int = 16,
) -> Picture:
    """A table of pictures of one size.

    Args:
        cells: rows of pictures.
        column_titles: titles above the first row.
        row_titles: written upright at the left of each row.
        footer: a picture below the table, e.g. :func:`legend_rows`.

    Raises:
        ValueError: no cells, or titles that do not match them.
    """
    if not cells or (row_titles is not None and len(row_titles) != len(cells)):
        raise ValueError(f"{len(cells)} rows and {len(row_titles or ())} row titles: expected as many, at least one")
    rows = []
    for number, row in enumerate(cells):
        picture = side_by_side(row, column_titles if number == 0 else None, gap, text_size)
        if row_titles is not None:
            label = _upright_label(row_titles[number], picture.shape[0], row[0].shape[0], text_size)
            picture = np.concatenate([label, picture], axis=1)
        rows.append(picture)
    sheet = stack_rows([*rows, *([] if footer is None else [footer])], gap)
    return cv2.copyMakeBorder(sheet, gap, gap, gap, gap, cv2.BORDER_CONSTANT, value=BACKGROUND).astype(np.uint8)


def _upright_label(text: str, height: int, body: int, text_size: int) -> Picture:
    """A column of ``height`` with ``text`` turned to read upwards, centred on the lowest ``body`` pixels."""
    canvas, draw = _canvas(round(text_size * 1.9), body)
    font = _font(text_size)
    draw.text((body / 2, canvas.height / 2), _fitted(text, body, font), TEXT, font, anchor="mm")
    turned = np.rot90(np.asarray(canvas))
    top = np.full((height - body, turned.shape[1], 3), BACKGROUND, dtype=np.uint8)
    return np.concatenate([top, turned])


def _canvas(height: int, width: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    return canvas, ImageDraw.Draw(canvas)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # A font that comes with Pillow, so that pictures look the same on every machine.
    return ImageFont.load_default(size)


def _entry_width(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return round(1.5 * _swatch(font) + font.getlength(name))


def _swatch(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    """Side of a colour swatch: the height of a capital letter including its ascent."""
    return round(font.getbbox("X")[3])


def _legend_entry(
    draw: ImageDraw.ImageDraw,
    x: float,
    y: float,
    width: float,
    class_id: int,
    palette: Palette,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    swatch = _swatch(font)
    top = y + 0.25 * swatch
    color = tuple(int(v) for v in palette.colors[class_id])
    draw.rectangle((x, top, x + swatch, top + swatch), fill=color, outline=FAINT)
    text = _fitted(palette.names[class_id].replace("_", " "), width - 1.5 * swatch, font)
    draw.text((x + 1.5 * swatch, top + swatch / 2), text, TEXT, font, anchor="lm")


def _fitted(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """``text``, shortened with an ellipsis until it fits."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..." if text else ""
