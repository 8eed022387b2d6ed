"""Predictions of several models next to the ground truth, as a video and as a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog

from the_mask.data.files import inside
from the_mask.data.io import apply_label_table, read_image, read_label_raw
from the_mask.data.registry import require_known
from the_mask.inference.demo import LEGEND_SHARE, MIN_HEIGHT, save_picture
from the_mask.inference.rendering import render
from the_mask.inference.rendering.render import Labels, Palette, Picture
from the_mask.inference.rendering.video_writer import VideoWriter

Record = Mapping[str, Any]
SHEET_CELL_WIDTH = 256


@dataclass(frozen=True)
class ComparedFrame:
    """A frame with its label maps: the ground truth (None where there is none) and each model's, by title."""

    video_id: str
    number: int
    image: Picture
    truth: Labels | None
    predictions: Mapping[str, Labels]


def read_frames(
    record: Record, prediction_dirs: Mapping[str, str | Path], label_table: Sequence[int]
) -> Iterator[ComparedFrame]:
    """Read a video's frames with label maps saved by ``TEST.SAVE_PREDICTIONS`` (raw, ``<dir>/<video>/<frame>.png``).

    Raises:
        FileNotFoundError, ValueError: a file is missing or unreadable; the message names it.
    """

    def labels(path: str | Path) -> Labels:
        return apply_label_table(read_label_raw(path), label_table, path)

    for number, frame in enumerate(record["frames"]):
        mask = frame["sem_seg_file_name"]
        name = (record["video_id"], f"{frame['frame_id']}.png")
        yield ComparedFrame(
            record["video_id"],
            number,
            read_image(frame["file_name"]),
            None if mask is None else labels(mask),
            {title: labels(inside(folder, *name)) for title, folder in prediction_dirs.items()},
        )


def compare_videos(
    dataset_name: str,
    records: Sequence[Record],
    prediction_dirs: Mapping[str, str | Path],
    output: str | Path,
    contact_sheet: str | Path | None = None,
    *,
    fps: float | Fraction = 8,
    alpha: float = 0.65,
    text_size: int = 16,
) -> int:
    """Write input | ground truth | each model, side by side, for whole videos one after the other.

    Pixels that a model gets wrong are hatched in white.

    Args:
        dataset_name: for class names, colours and the label table.
        records: videos to show.
        prediction_dirs: title -> folder of saved predictions.
        output: video file.
        contact_sheet: PNG with the middle frame of every video.
        fps: of the output.
        alpha: see :func:`render.overlay`.
        text_size: pixels.

    Returns:
        Number of frames written.
    """
    require_known(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    palette = Palette(metadata.stuff_classes, metadata.stuff_colors, metadata.ignore_label)
    table = metadata.label_table
    classes = _classes_on_screen(records, prediction_dirs, palette, table)
    titles = ["input", "ground truth", *prediction_dirs]
    note = "hatched: wrong"
    sheet: list[list[Picture]] = []
    legend: Picture | None = None
    count = 0
    with VideoWriter(output, fps) as writer:
        for record in records:
            middle = len(record["frames"]) // 2
            for frame in read_frames(record, prediction_dirs, table):
                factor = max(1, math.ceil(MIN_HEIGHT / frame.image.shape[0]))
                row = render.side_by_side(_panels(frame, palette, alpha, factor), titles, text_size=text_size)
                if legend is None or legend.shape[1] != row.shape[1]:
                    legend = render.legend_rows(classes, palette, row.shape[1], text_size, note)
                writer.write(render.stack_rows([row, legend], gap=0))
                count += 1
                if frame.number == middle:
                    cell = max(1, math.ceil(SHEET_CELL_WIDTH / frame.image.shape[1]))
                    sheet.append(_panels(frame, palette, alpha, cell))
    if contact_sheet is not None and sheet:
        width = sum(picture.shape[1] for picture in sheet[0]) + 6 * (len(titles) - 1)
        names = [f"{record['video_id']}, frame {len(record['frames']) // 2}" for record in records]
        footer = render.legend_rows(classes, palette, width, text_size, note)
        save_picture(render.contact_sheet(sheet, titles, names, footer, text_size=text_size), contact_sheet)
    return count


def _classes_on_screen(
    records: Sequence[Record], prediction_dirs: Mapping[str, str | Path], palette: Palette, table: Sequence[int]
) -> list[int]:
    """The classes in any of the maps, so that the legend keeps its size throughout the video."""
    present: set[int] = set()
    for record in records:
        for frame in read_frames(record, prediction_dirs, table):
            for labels in (frame.truth, *frame.predictions.values()):
                if labels is not None:
                    present.update(render.present_classes(labels, len(palette.names), LEGEND_SHARE))
    return sorted(present)


def _panels(frame: ComparedFrame, palette: Palette, alpha: float, factor: int) -> list[Picture]:
    image = render.enlarge(frame.image, factor)
    panels = [image, image if frame.truth is None else render.overlay(image, frame.truth, palette, alpha)]
    for labels in frame.predictions.values():
        panel = render.overlay(image, labels, palette, alpha)
        if frame.truth is not None:
            panel = render.hatch(panel, (labels != frame.truth) & (frame.truth != palette.ignore_label))
        panels.append(panel)
    return panels
