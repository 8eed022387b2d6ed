"""Check a data set: first its structure, then the content of every file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog

from the_mask.data.class_pixels import class_warnings, count_ids
from the_mask.data.classes import as_label_table, as_names
from the_mask.data.io import (
    check_same_size,
    exif_problem,
    illegal_values,
    read_image_and_orientation,
    read_label_and_orientation,
)
from the_mask.data.registry import Problem, Record, get_records, registered_tree, require_known

Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass
class FrameCheck:
    """Result for one frame: (height, width) of the image, pixels per class and per ignored value, problems."""

    file: str
    size: tuple[int, int] | None = None
    pixels: dict[int, int] = field(default_factory=dict)
    ignored: Counter[int] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)


@dataclass
class CheckReport:
    """Result of :func:`check_dataset`.

    Attributes:
        name: data set.
        videos, frames, masks: how many there are.
        frames_checked: frames whose files were read.
        sizes: frames per (height, width).
        class_pixels: pixels per class, int64 [K].
        ignored_pixels: pixels that carry the ignore label.
        problems: everything found.
        warnings: allowed but rarely intended: classes without a pixel, a single class.
    """

    name: str
    videos: int
    frames: int
    masks: int
    frames_checked: int
    sizes: Counter[tuple[int, int]]
    class_pixels: np.ndarray
    ignored_pixels: int
    problems: list[Problem]
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def check_frame(frame: dict[str, str | None], label_table: Sequence[int], num_classes: int) -> FrameCheck:
    """Read one frame's image and mask and collect their problems."""
    image_path, label_path = str(frame["file_name"]), frame["sem_seg_file_name"]
    result = FrameCheck(image_path)
    image, orientation = None, 1
    try:
        image, orientation = read_image_and_orientation(image_path)
        result.size = (image.shape[0], image.shape[1])
    except (ValueError, FileNotFoundError) as error:
        result.problems.append(Problem("unreadable image", image_path, str(error)))
    if label_path is None:
        return result
    try:
        raw, label_orientation = read_label_and_orientation(label_path)
    except (ValueError, FileNotFoundError) as error:
        result.problems.append(Problem("unreadable mask", label_path, str(error)))
        return result
    if image is not None:
        try:
            check_same_size(image, raw, image_path, label_path)
        except ValueError as error:
            result.problems.append(Problem("size mismatch", label_path, str(error)))
        else:
            turned = exif_problem(orientation, label_orientation)
            if turned:
                result.problems.append(Problem("EXIF orientation", image_path, turned))
    illegal = illegal_values(raw, label_table)
    if illegal:
        share = np.isin(raw, illegal).mean()
        text = f"label values {illegal} are not declared ({share:.1%} of the pixels)"
        result.problems.append(Problem("label value", label_path, text))
    else:
        values, counts = np.unique(raw, return_counts=True)
        result.pixels, result.ignored = count_ids(dict(zip(values.tolist(), counts.tolist())), label_table, num_classes)
    return result


def check_dataset(
    name: str, max_files: int | None = None, jobs: int = 1, progress: Progress = lambda items, total: items
) -> CheckReport:
    """Check a registered data set.

    Args:
        name: catalogue name.
        max_files: read at most this many frames, spread evenly; None reads all. The structure is always checked
            completely.
        jobs: processes that read files.
        progress: wraps the iteration over frames, e.g. a progress bar.

    Raises:
        ValueError: unknown name, or registered without classes or label table.
        FileNotFoundError: the data set does not exist.
    """
    require_known(name)
    metadata = MetadataCatalog.get(name)
    classes, table = metadata.get("stuff_classes"), metadata.get("label_table")
    if classes is None or table is None:
        raise ValueError(
            f"data set {name} has no stuff_classes and label_table; register it by register_video_tree or _image_tree"
        )
    tree = registered_tree(name)
    if tree is None:
        records, problems = get_records(name), []
    else:
        scan = tree.scan()
        records, problems = scan.records, scan.problems + tree.inspect(scan.records)
    frames = [frame for record in records for frame in record["frames"]]
    chosen = frames
    if max_files is not None and max_files < len(frames):
        chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, max(1, max_files)).round().astype(int)]

    report = CheckReport(
        name=name,
        videos=len(records),
        frames=len(frames),
        masks=sum(frame["sem_seg_file_name"] is not None for frame in frames),
        frames_checked=len(chosen),
        sizes=Counter(),
        class_pixels=np.zeros(len(classes), np.int64),
        ignored_pixels=0,
        problems=problems,
    )
    sizes: dict[str, tuple[int, int]] = {}
    ignored: Counter[int] = Counter()
    check = partial(check_frame, label_table=as_label_table(table), num_classes=len(as_names(classes)))
    for result in progress(_map(check, chosen, jobs), len(chosen)):
        report.problems += result.problems
        if result.size is not None:
            report.sizes[result.size] += 1
            sizes[result.file] = result.size
        ignored += result.ignored
        for train_id, count in result.pixels.items():
            report.class_pixels[train_id] += count
    report.ignored_pixels = ignored.total()
    where = "" if len(chosen) == len(frames) else f" in {len(chosen)} of {len(frames)} frames"
    report.warnings = class_warnings(classes, report.class_pixels, ignored, where)
    report.problems += _changing_sizes(records, sizes)
    return report


def _map(function: Callable[..., FrameCheck], frames: Sequence[Any], jobs: int) -> Iterable[FrameCheck]:
    if jobs <= 1:
        yield from map(function, frames)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(function, frames, chunksize=16)


def _changing_sizes(records: Sequence[Record], sizes: dict[str, tuple[int, int]]) -> list[Problem]:
    """Problems of frames that differ in size from the first readable frame of their video."""
    problems = []
    for record in records:
        known = [(f["file_name"], sizes[f["file_name"]]) for f in record["frames"] if f["file_name"] in sizes]
        for file, size in known[1:]:
            if size != known[0][1]:
                text = f"is {size[0]}x{size[1]}, but the video starts with {known[0][1][0]}x{known[0][1][1]}"
                problems.append(Problem("size changes in video", file, text))
    return problems
