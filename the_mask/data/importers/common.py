"""Shared by all importers: frames with label maps, drawing shapes into them, and counts of what was noticed.

Axes: H W pixels. A label map is int32 [H, W] of class indices; :data:`NOTHING` is a pixel without a class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pycocotools import mask as coco_mask

from the_mask.data.files import inside
from the_mask.data.io import IMAGE_SUFFIXES, read_size

NOTHING = -1
MOST_CLASSES = 65535
# Names of a list that are printed.
SHOWN = 5


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
        splits: of "train" and "val", the names of the videos, and the number of labelled frames.
    """

    frames: int = 0
    labelled: int = 0
    videos: int = 0
    noticed: Counter[str] = field(default_factory=Counter)
    splits: dict[str, tuple[list[str], int]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.videos} videos, {self.frames} frames, {self.labelled} of them labelled"]
        lines += [
            f"{split}: {len(videos)} videos, {count} labelled frames"
            + (f" ({_some(videos)})" if split == "val" else "")
            for split, (videos, count) in self.splits.items()
        ]
        if "val" not in self.splits:
            lines.append("nothing is for validation: a training on it is not evaluated")
        train, val = (self.splits.get(split, ([], 0))[1] for split in ("train", "val"))
        if val > train:
            lines.append("the larger part is for validation: move videos from val.txt to train.txt")
        return "\n".join(lines + [f"{what}: {count}" for what, count in sorted(self.noticed.items())])


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:SHOWN], *(["..."] if len(names) > SHOWN else [])])


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

    def polygons(self, polygons: Sequence[Sequence[float]], label: int, where: str) -> None:
        """Draw the union of polygons, each [x0, y0, x1, y1, ...] in pixels, rasterised as COCO does.

        Raises:
            ValueError: coordinates that are no pairs of finite numbers; it starts with ``where``.
        """
        height, width = self.labels.shape
        mask = np.zeros((height, width), bool)
        for polygon in polygons:
            points = as_points(polygon, where)
            if len(points) < 3:
                self.report.noticed["polygons of fewer than three points, left out"] += 1
            elif (points < 0).any() or (points > [width, height]).any():
                outside = (points.max(0) <= 0).any() or (points.min(0) >= [width, height]).any()
                how = "outside the picture, left out" if outside else "that reach outside the picture, cut there"
                self.report.noticed[f"polygons {how}"] += 1
                if not outside:
                    mask |= _polygon_beyond(points, height, width)
            else:
                mask |= _polygon(points, height, width)
        self.mask(mask, label)

    def rle(self, rle: Mapping[str, Any], label: int, where: str) -> None:
        """Draw COCO's run-length code, compressed or as a list of counts.

        Raises:
            ValueError: the code has another size, or is damaged.
        """
        height, width = self.labels.shape
        runs = checked_runs(rle, (height, width), where)
        values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        self.mask(values.reshape(width, height).T, label)


def as_points(values: Any, where: str) -> np.ndarray:
    """Points [P, 2] from pairs, or from x, y, x, y, ...

    Args:
        values: from a file.
        where: start of the error message.

    Raises:
        ValueError: the values are no pairs of finite numbers.
    """
    try:
        points = np.asarray(values, float).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: a polygon is x, y, x, y, ..., got {values!r:.80}") from error
    if not np.isfinite(points).all():
        raise ValueError(f"{where}: a polygon has a coordinate that is no finite number")
    return points


def checked_runs(rle: Mapping[str, Any], size: tuple[int, int], where: str) -> list[int]:
    """Runs of COCO's run-length code, compressed or as a list of counts, in column order, zeros first.

    Args:
        rle: ``size`` and ``counts``.
        size: (H, W) that it must have.
        where: start of the error message.

    Raises:
        ValueError: the code has another size, or is damaged.
    """
    height, width = size
    try:
        size_found, counts = rle["size"], rle["counts"]
        if list(size_found) != [height, width]:
            raise ValueError(f"it has size {size_found!r:.80}, the picture [{height}, {width}]")
        runs = counts if isinstance(counts, list) else rle_runs(counts)
        if not all(type(run) is int and 0 <= run <= height * width for run in runs):
            raise ValueError("its runs are no whole numbers within the picture")
        # pycocotools would fill up with whatever is in the memory.
        if sum(runs) != height * width:
            raise ValueError(f"its runs have {sum(runs)} pixels, the picture {height * width}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: a run-length code cannot be read: {error}") from error
    return runs


def rle_runs(counts: str | bytes) -> list[int]:
    """Runs of COCO's compressed code, in column order, zeros first.

    Every character holds five bits of a number, lowest first, and one that says that more follow; numbers are signed,
    and from the fourth on differences to the last but one.

    Raises:
        ValueError: characters that do not occur, or the last number is incomplete.
        TypeError: no text.
    """
    if not isinstance(counts, (str, bytes)):
        raise TypeError(f"its counts are a {type(counts).__name__}")
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode("ascii") if isinstance(counts, str) else counts:
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError(f"character {chr(character)!r} does not occur in such codes")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
        elif shift > 60:
            raise ValueError("a number in it has no end")
    if shift:
        raise ValueError("its last number is incomplete")
    return runs


def _polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    return coco_mask.decode(coco_mask.frPyObjects([points.reshape(-1).tolist()], height, width)[0]) > 0


def _polygon_beyond(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """A polygon that reaches outside: drawn on a picture three times as large, because pycocotools bends others."""
    size = np.array([width, height])
    for axis in (0, 1):
        for side, bound in ((1, 2 * size[axis]), (-1, size[axis])):
            points = _clip(points, axis, side, bound)
    if len(points) < 3:
        return np.zeros((height, width), bool)
    return _polygon(points + size, 3 * height, 3 * width)[height : 2 * height, width : 2 * width]


def _clip(points: np.ndarray, axis: int, side: int, bound: float) -> np.ndarray:
    """The part of a polygon [P, 2] where ``side * coordinate <= bound`` (Sutherland and Hodgman)."""
    values = side * points[:, axis]
    result = []
    for i in range(len(points)):
        start, end = values[i - 1], values[i]
        if (start <= bound) != (end <= bound):
            result.append(points[i - 1] + (points[i] - points[i - 1]) * ((bound - start) / (end - start)))
        if end <= bound:
            result.append(points[i])
    return np.array(result).reshape(-1, 2)


def canvas_on(image: Path, size: tuple[Any, Any] | None, where: str, report: ImportReport) -> Canvas:
    """An empty label map of a picture.

    Args:
        image: the picture.
        size: height and width as the annotations say them, if they do.
        where: said in the error.
        report: of the canvas.

    Raises:
        ValueError: the picture has another size.
    """
    actual = read_size(image)
    if size is not None and size != actual:
        raise ValueError(
            f"{where}: the annotation is of a picture of {size[0]!r:.20}x{size[1]!r:.20} (height x width), {image} is "
            f"{actual[0]}x{actual[1]}"
        )
    return Canvas(*actual, report)


class Pictures(Protocol):
    """Where pictures come from, when it is no folder."""

    def find(self, name: str, where: str) -> Path:
        """The picture of a name; raises FileNotFoundError or ValueError that starts with ``where``."""
        ...


def find_image(frames: Path | Pictures, name: str, where: str) -> Path:
    """Find a picture by name below the folder ``frames``: as given, or with one of the known suffixes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the name leads out of the folder.
    """
    if not isinstance(frames, Path):
        return frames.find(name, where)
    path = inside(frames, name, where=where)
    candidates = [path, *(path.with_suffix(suffix) for suffix in IMAGE_SUFFIXES)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{where} names the picture {name}, which is not in {frames} (give its folder by --frames)")


def frame_number(name: str) -> int | None:
    """The number at the end of a frame's name: 12 of ``frame_000012``."""
    digits = name[len(name.rstrip("0123456789")) :]
    return int(digits) if digits else None


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
        ValueError: no names, a name twice, or more than masks of 16 bits can tell apart.
    """
    if len(names) > MOST_CLASSES:
        raise ValueError(f"{where}: {len(names)} classes, of which at most {MOST_CLASSES} fit into a mask")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if not names or twice:
        raise ValueError(f"{where}: {'classes named twice: ' + ', '.join(twice[:20]) if twice else 'no classes'}")
    return list(names)
