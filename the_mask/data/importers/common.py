"""Shared by all importers: frames with label maps, drawing shapes into them, and counts of what was noticed.

Axes: H W pixels. A label map is int32 [H, W] of class indices; :data:`NOTHING` is a pixel without a class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from the_mask.data.io import IMAGE_SUFFIXES

NOTHING = -1


@dataclass(frozen=True)
class LabelledFrame:
    """One frame of an imported data set.

    Attributes:
        video: its name, a relative path.
        name: of the frame, without suffix; sorts by time.
        image: the picture's file.
        labels: int32 [H, W], or None for a frame without annotation.
    """

    video: str
    name: str
    image: Path
    labels: np.ndarray | None


@dataclass
class ImportReport:
    """Counts of an import, and of what the user should know about.

    Attributes:
        frames, labelled, videos: counts.
        noticed: count by description: pixels that a later shape covers, shapes that reach outside the picture, ...
    """

    frames: int = 0
    labelled: int = 0
    videos: int = 0
    noticed: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.videos} videos, {self.frames} frames, {self.labelled} of them labelled"]
        return "\n".join(lines + [f"{what}: {count}" for what, count in sorted(self.noticed.items())])


@dataclass
class Labels:
    """A data set, as an importer returns it.

    Attributes:
        names: K class names.
        colors: K colours (r, g, b), or None.
        frames: read lazily, while the output is written; the frames of a video are consecutive.
        report: filled while the frames are read.
    """

    names: list[str]
    colors: list[tuple[int, int, int]] | None
    frames: Iterator[LabelledFrame]
    report: ImportReport = field(default_factory=ImportReport)


class Canvas:
    """A label map to draw shapes into. A later shape covers an earlier one; covered pixels are counted."""

    def __init__(self, height: int, width: int, report: ImportReport) -> None:
        self.labels = np.full((height, width), NOTHING, np.int32)
        self.report = report

    def mask(self, mask: np.ndarray, label: int) -> None:
        """Draw where a mask [H, W] is true."""
        covered = mask & (self.labels != NOTHING) & (self.labels != label)
        if covered.any():
            self.report.noticed["pixels that a later shape of another class covers"] += int(covered.sum())
        self.labels[mask] = label

    def polygons(self, polygons: Sequence[Sequence[float]], label: int) -> None:
        """Draw the union of polygons, each [x0, y0, x1, y1, ...] in pixels, rasterised as COCO does."""
        height, width = self.labels.shape
        whole = [list(map(float, polygon)) for polygon in polygons if len(polygon) >= 6]
        if len(whole) < len(polygons):
            self.report.noticed["polygons of fewer than three points, left out"] += len(polygons) - len(whole)
        for polygon in whole:
            xs, ys = polygon[::2], polygon[1::2]
            if min(xs) < 0 or min(ys) < 0 or max(xs) > width or max(ys) > height:
                self.report.noticed["polygons that reach outside the picture, cut there"] += 1
        if whole:
            # pycocotools cuts at the border only where coordinates are not negative.
            clipped = [
                [min(max(value, 0.0), float(width if i % 2 == 0 else height)) for i, value in enumerate(polygon)]
                for polygon in whole
            ]
            self.mask(coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(clipped, height, width))) > 0, label)

    def rle(self, rle: Mapping[str, Any], label: int, where: str) -> None:
        """Draw COCO's run-length code, compressed or as a list of counts.

        Raises:
            ValueError: the code has another size, or is damaged.
        """
        height, width = self.labels.shape
        try:
            size = [int(side) for side in rle["size"]]
            if size != [height, width]:
                raise ValueError(f"it has size {size}, the picture [{height}, {width}]")
            counts = rle["counts"]
            if isinstance(counts, list):
                if sum(counts) != height * width or min(counts, default=0) < 0:
                    raise ValueError(f"its runs have {sum(counts)} pixels, the picture {height * width}")
                coded = coco_mask.frPyObjects({"size": size, "counts": counts}, height, width)
            else:
                coded = {"size": size, "counts": counts.encode() if isinstance(counts, str) else counts}
            self.mask(coco_mask.decode(coded) > 0, label)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: a run-length code cannot be read: {error}") from error


def find_image(folder: Path, name: str, where: str) -> Path:
    """Find a picture by name below ``folder``: as given, or with one of the known suffixes.

    Raises:
        FileNotFoundError: there is none.
    """
    from the_mask.data.files import inside

    path = inside(folder, name)
    candidates = [path, *(path.with_suffix(suffix) for suffix in IMAGE_SUFFIXES)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{where} names the picture {name}, which is not in {folder} (give its folder by --frames)")


def split_name(name: str, video: str) -> tuple[str, str]:
    """Video and frame of a picture's relative name: the folder is the video; without a folder it is ``video``."""
    path = Path(name)
    parent = path.parent.as_posix()
    return (video if parent == "." else parent), path.stem


def class_index(names: Sequence[str], name: str, where: str) -> int:
    """Index of a class.

    Raises:
        ValueError: there is no such class.
    """
    if name not in names:
        raise ValueError(f"{where}: unknown class {name!r}; known: {', '.join(names)}")
    return list(names).index(name)


def check_names(names: Sequence[str], where: str | Path) -> list[str]:
    """Check class names and return them as a list.

    Raises:
        ValueError: no names, or a name twice.
    """
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if not names or twice:
        raise ValueError(f"{where}: {'classes named twice: ' + ', '.join(twice) if twice else 'no classes'}")
    return list(names)
