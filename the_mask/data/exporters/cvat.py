"""Pre-annotations for CVAT: upload them to a task of the same frames and correct them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from PIL import Image

from the_mask.data.classes import distinct_colors
from the_mask.data.exporters.common import Exporter, LabelFrame, Region, Spool
from the_mask.data.files import atomic_write
from the_mask.data.importers.common import frame_number

BACKGROUND = "background"
MOST_OBJECTS = 255
Color = tuple[int, int, int]


class CvatMasksExporter(Exporter):
    """``<video>.zip``: CVAT's "Segmentation mask 1.1", masks in the colours of the archive's own table.

    A class named "background", and pixels without a class, are CVAT's background: black. A class whose colour is black
    or that of another class gets another one, because the archive identifies classes by colour.
    """

    frame_name = "frame_{:06d}"

    def begin(self, video: str) -> None:
        colors = own_colors(self.classes.names, self.classes.colors)
        if self.report.videos == 1:
            changed = sum(a != b for a, b in zip(colors, self.classes.colors, strict=True) if a is not None)
            if changed:
                self.report.noticed["classes with another colour, theirs is black or that of another class"] = changed
        self._colors = np.array([color or (0, 0, 0) for color in colors], np.uint8)
        self._frames: list[str] = []
        self._spool = Spool(self.folder)
        self._zip = zipfile.ZipFile(self._spool.file, "w")
        named = [(name, color) for name, color in zip(self.classes.names, colors, strict=True) if color is not None]
        for name, _ in named:
            if ":" in name or "\n" in name or name.startswith("#"):
                raise ValueError(
                    f"class {name!r}: CVAT's labelmap.txt holds no names with ':', a line break or '#' first"
                )
        rows = [f"{name}:{r},{g},{b}::" for name, (r, g, b) in [(BACKGROUND, (0, 0, 0)), *named]]
        self._add("labelmap.txt", "\n".join(["# label:color_rgb:parts:actions", *rows, ""]).encode())

    def add(self, frame: LabelFrame, found: list[Region]) -> None:
        classes = np.zeros((*frame.labels.shape, 3), np.uint8)
        objects = np.zeros_like(classes)
        shown = [region for region in found if self._colors[region.label].any()]
        for number, region in enumerate(shown, 1):
            classes[region.mask] = self._colors[region.label]
            objects[region.mask] = voc_color(number)
        self._add(f"SegmentationClass/{frame.name}.png", _png(classes))
        # An object per class. Readers know 255 colours; without the file they make objects from the classes.
        if len(shown) <= MOST_OBJECTS:
            self._add(f"SegmentationObject/{frame.name}.png", _png(objects))
        self._frames.append(frame.name)

    def end(self, video: str) -> None:
        self._add("ImageSets/Segmentation/default.txt", "".join(f"{name}\n" for name in self._frames).encode())
        with self._given_up_after_errors():
            self._zip.close()
        atomic_write(self.path(f"{video}.zip"), self._spool.copy_to)

    def _add(self, name: str, content: bytes) -> None:
        with self._given_up_after_errors():
            # One date for all, so that equal predictions make equal archives.
            self._zip.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)

    @contextmanager
    def _given_up_after_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # Otherwise it would be completed when it is collected, and print that this fails.
            self._zip.fp = None
            raise


class CvatVideoExporter(Exporter):
    """``<video>.xml``: CVAT's "CVAT for video 1.1", a mask for every class in every frame.

    Frames have the number at the end of their names, or else count from 0; these are the frame numbers of the task.
    CVAT turns such masks into single-frame shapes.
    """

    frame_name = "frame_{:06d}"

    def begin(self, video: str) -> None:
        self._tracks = Spool(self.folder)
        self._count, self._numbers = 0, set[int]()

    def add(self, frame: LabelFrame, found: list[Region]) -> None:
        self.require_one_size(frame)
        number = frame_number(frame.name)
        number = len(self._numbers) if number is None else number
        if number in self._numbers:
            raise ValueError(f"video {frame.video}, frame {frame.name}: another frame has number {number}, too")
        self._numbers.add(number)
        for region in found:
            mask = _cvat_mask(region.mask)
            name = quoteattr(self.classes.names[region.label])
            # The second mask ends the track; after the last frame there is none.
            shapes = "".join(
                f'    <mask frame="{at}" keyframe="1" outside="{outside}" occluded="0" {mask} z_order="0"></mask>\n'
                for at, outside in ((number, 0), (number + 1, 1))
            )
            self._tracks.file.write(
                f'  <track id="{self._count}" label={name} source="auto">\n{shapes}  </track>\n'.encode()
            )
            self._count += 1

    def end(self, video: str) -> None:
        labels = "".join(
            f"          <label><name>{escape(name)}</name><color>#{r:02x}{g:02x}{b:02x}</color></label>\n"
            for name, (r, g, b) in zip(self.classes.names, self.classes.colors, strict=True)
        )
        height, width = self._size
        head = (
            '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n  <meta>\n    <task>\n'
            f"      <name>{escape(video)}</name>\n      <size>{self.report.frames}</size>\n"
            f"      <mode>interpolation</mode>\n      <labels>\n{labels}      </labels>\n"
            f"      <original_size><width>{width}</width><height>{height}</height></original_size>\n"
            "    </task>\n  </meta>\n"
        )

        def write(stream: BinaryIO) -> None:
            stream.write(head.encode())
            self._tracks.copy_to(stream)
            stream.write(b"</annotations>\n")

        atomic_write(self.path(f"{video}.xml"), write)


def voc_color(number: int) -> Color:
    """The colour of an object by its number in Pascal VOC: its bits, three at a time, from the highest of r, g, b."""
    channels = [0, 0, 0]
    for place in range(24):
        channels[place % 3] |= (number >> place & 1) << (7 - place // 3)
    return channels[0], channels[1], channels[2]


def own_colors(names: Sequence[str], colors: Sequence[Color]) -> list[Color | None]:
    """Colours that tell classes apart: none is black or used twice; None for the class named "background"."""
    used: set[Color] = {(0, 0, 0)}
    spare = (color for color in distinct_colors(2 * len(names) + 1) if color not in set(colors))
    result: list[Color | None] = []
    for name, color in zip(names, map(tuple, colors), strict=True):
        if name.lower() == BACKGROUND:
            result.append(None)
            continue
        if color in used:
            color = next(spare)
        used.add(color)  # type: ignore[arg-type]
        result.append(color)  # type: ignore[arg-type]
    return result


def _cvat_mask(mask: np.ndarray) -> str:
    """Attributes of a ``<mask>``: its box, and runs of zeros and ones in row order within it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    inner = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    flat = inner.reshape(-1)
    edges = [0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), flat.size]
    runs = np.diff(edges).tolist()
    # The first run is of zeros.
    runs = [0, *runs] if flat[0] else runs
    height, width = inner.shape
    return f'rle="{", ".join(map(str, runs))}" left="{left}" top="{top}" width="{width}" height="{height}"'


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
