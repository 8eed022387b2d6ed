"""Segment a video and write an annotated video, and optionally a contact sheet."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Generic, TypeVar

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from PIL import Image
from tqdm import tqdm

import the_mask.data  # noqa: F401  registers the data sets
from the_mask.data.class_names import check_classes, classes_dataset
from the_mask.data.classes import distinct_colors
from the_mask.data.clips import Clip
from the_mask.data.files import atomic_write, check_writable
from the_mask.inference.live.frame_source import TimedFrame
from the_mask.inference.live.many_streams import StreamEngine, StreamResult
from the_mask.inference.rendering import render
from the_mask.inference.rendering.render import Labels, Palette, Picture
from the_mask.inference.rendering.video_writer import FrameSource, VideoWriter, fit_into
from the_mask.inference.sinks import LabelFolder, Sink
from the_mask.modeling.stream import Stream

logger = logging.getLogger(__name__)
T = TypeVar("T")
# Frames with less height are enlarged by a whole factor, so that the legend next to them is readable.
MIN_HEIGHT = 240
# A class stays in the legend for this long after it was last seen (a flickering legend is unreadable) ...
LEGEND_SECONDS = 1.0
# ... and is added when it covers this share of a frame.
LEGEND_SHARE = 0.0005
SHEET_COLUMNS, SHEET_CELL_WIDTH = 4, 320
# File formats of contact sheets.
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
AUDIO = ("copy", "drop")


@dataclass(frozen=True)
class DemoStyle:
    """How a segmented frame is shown.

    Attributes:
        alpha: 0 shows the frame only, 1 the class colours only.
        legend: show a column with the classes on screen.
        show_input: show the original frame next to the overlay.
        text_size: pixels.
    """

    alpha: float = 0.55
    legend: bool = True
    show_input: bool = False
    text_size: int = 15


@dataclass
class DemoReport:
    """Statistics of a demo run. ``seconds`` covers decoding, model, drawing and encoding."""

    frames: int = 0
    keyframes: int = 0
    seconds: float = 0.0
    interrupted: bool = False


class FrameAnnotator:
    """Draws one video: the overlay, optionally the input next to it, and a legend of the classes on screen."""

    def __init__(self, palette: Palette, style: DemoStyle, fps: Fraction | float) -> None:
        self.palette = palette
        self.style = style
        self._hold = max(1, round(LEGEND_SECONDS * fps))
        self._last_seen: dict[int, int] = {}
        self._number = 0
        # Cache of the last legend, because text is slow to draw.
        self._drawn: tuple[tuple[list[int], int], Picture] | None = None

    def draw(self, frame: Picture, labels: Labels) -> Picture:
        """Draw the next frame; the size of the picture depends only on the frame's size."""
        style = self.style
        factor = max(1, math.ceil(MIN_HEIGHT / frame.shape[0]))
        large = render.enlarge(frame, factor)
        shown = render.overlay(large, labels, self.palette, style.alpha)
        if style.show_input:
            shown = render.side_by_side([large, shown], ["input", "segmentation"], text_size=style.text_size)
        if style.legend:
            shown = np.concatenate([shown, self._legend(labels, shown.shape[0])], axis=1)
        self._number += 1
        return shown

    def _legend(self, labels: Labels, height: int) -> Picture:
        for class_id in render.present_classes(labels, len(self.palette.names), LEGEND_SHARE):
            self._last_seen[class_id] = self._number
        recent = sorted(c for c, seen in self._last_seen.items() if self._number - seen < self._hold)
        if self._drawn is None or self._drawn[0] != (recent, height):
            width = 12 * self.style.text_size
            column = render.legend_column(recent, self.palette, height, width, self.style.text_size)
            self._drawn = (recent, height), column
        return self._drawn[1]


class EvenSample(Generic[T]):
    """Keeps about evenly spaced items of a sequence of unknown length: at most ``2 * count`` of them at any time."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: list[T] = []
        self._step = 1
        self._seen = 0

    def add(self, item: T) -> None:
        """Add the next item."""
        if self._seen % self._step == 0:
            self._kept.append(item)
            if len(self._kept) > 2 * self.count:
                self._kept, self._step = self._kept[::2], 2 * self._step
        self._seen += 1

    def items(self) -> list[T]:
        """At most ``count`` items, including the first and last ones kept."""
        if len(self._kept) <= self.count:
            return list(self._kept)
        return [self._kept[i] for i in np.linspace(0, len(self._kept) - 1, self.count).round().astype(int)]


def segment_video(
    segmentor: Stream, source: FrameSource, max_frames: int = 0, asynchronous: bool = False
) -> Generator[StreamResult, None, None]:
    """Segment the frames of a source with the streaming engine, starting from a new state.

    Of a live source, frames that arrive faster than they are segmented are dropped; of other sources, none.

    Args:
        segmentor: a stream of pictures with output "labels", such as ``StreamingSegmentor``.
        source: open input.
        max_frames: stop after this many; 0 takes all.
        asynchronous: compute keyframes in a background thread; see ``StreamEngine``.

    Raises:
        ValueError: the input breaks off; raised after the frames before that.
    """
    with StreamEngine(segmentor, asynchronous=asynchronous) as engine:
        name = engine.add(source)
        for result in engine.results():
            yield result
            if result.number + 1 == max_frames:
                return
        report = engine.reports[name]
        if report.dropped:
            logger.warning(f"{name}: {report.dropped} of {report.decoded} frames came too fast and were dropped")
        if report.error is not None:
            raise ValueError(report.error)


def run_demo(
    segmentor: Stream,
    source: FrameSource,
    palette: Palette,
    output: str | Path | None,
    *,
    contact_sheet: str | Path | None = None,
    sinks: Sequence[Sink] = (),
    style: DemoStyle | None = None,
    max_frames: int = 0,
    progress: bool = True,
    asynchronous: bool = False,
    audio: str = "copy",
    stoppable: bool = True,
) -> DemoReport:
    """Segment a video and write an annotated copy, with the timestamps and the sound of the input.

    Ctrl-C ends the run early (the way to stop a camera); the video written so far is complete and playable. The same
    holds for an error, which is raised after the file has been closed.

    Args:
        segmentor: see :func:`segment_video`.
        source: open input.
        palette: names and colours of the segmentor's classes.
        output: video file to write, or None.
        contact_sheet: PNG with about a dozen frames.
        sinks: further outputs for each frame's labels; closed at the end, also after Ctrl-C and errors.
        style: how to draw.
        max_frames: 0 takes all.
        progress: show a bar when standard error is a terminal.
        asynchronous: see :func:`segment_video`.
        audio: "copy" the input's sound if the output can hold it, or "drop" it.
        stoppable: Ctrl-C ends the run early, and errors say what was written before; without it both are raised as
            they are.

    Raises:
        ValueError: an output that cannot be written or is the input, the input breaks off, or labels without a colour.
        OSError: the output cannot be written.
    """
    style = style or DemoStyle()
    if max_frames < 0:
        raise ValueError(f"max_frames {max_frames}: expected 1 or more, or 0 for all")
    check_outputs(source, palette, output, contact_sheet, style, sinks)
    if audio not in AUDIO:
        raise ValueError(f"audio {audio!r}: expected one of {', '.join(AUDIO)}")
    annotator = FrameAnnotator(palette, style, source.fps)
    sheet: EvenSample[tuple[float, Picture]] = EvenSample(3 * SHEET_COLUMNS)
    seen: set[int] = set()
    report, start = DemoReport(), time.perf_counter()
    total = min(n for n in (source.num_frames, max_frames or None, math.inf) if n is not None)
    bar = tqdm(
        total=None if total == math.inf else int(total),
        desc=Path(source.name).name,
        unit="frame",
        disable=not (progress and sys.stderr.isatty()),
    )
    results = segment_video(segmentor, source, max_frames, asynchronous)
    try:
        sound = source.sound if audio == "copy" else None
        with contextlib.ExitStack() as stack:
            writer = None
            if output is not None:
                writer = stack.enter_context(VideoWriter(output, source.fps, sound=sound))
            for sink in sinks:
                stack.callback(sink.close)
            stack.enter_context(contextlib.closing(results))
            stack.enter_context(bar)
            for result in results:
                (frame, seconds, duration), labels = result.frame, np.asarray(result.output)
                if writer is not None:
                    writer.write(TimedFrame(annotator.draw(frame, labels), seconds, duration))
                number = report.frames
                clip = Clip(frame_ids=[f"{number:08d}"], frame_indices=[number], timestamps=[seconds])
                for sink in sinks:
                    sink.process([clip], [[labels]])
                if contact_sheet is not None:
                    sheet.add((seconds, _sheet_cell(frame, labels, palette, style)))
                    seen.update(render.present_classes(labels, len(palette.names), LEGEND_SHARE))
                report.frames += 1
                report.keyframes += bool(result.keyframe)
                bar.update()
    except KeyboardInterrupt:
        if not stoppable:
            raise
        report.interrupted = True
    except ValueError as error:
        if not (report.frames and stoppable):
            raise
        where = f"are in {output}" if output is not None else "were written"
        raise ValueError(f"{error}; the {report.frames} frames before it {where}") from error
    if contact_sheet is not None and report.frames:
        save_picture(_sheet(sheet.items(), sorted(seen), palette, style), contact_sheet)
    report.seconds = time.perf_counter() - start
    return report


def check_outputs(
    source: FrameSource,
    palette: Palette,
    output: str | Path | None,
    contact_sheet: str | Path | None = None,
    style: DemoStyle | None = None,
    sinks: Sequence[Sink] = (),
) -> None:
    """Check the names and the size of the outputs before any work is done.

    Args:
        source, palette, output, contact_sheet, style, sinks: see :func:`run_demo`.

    Raises:
        ValueError: an unknown suffix, a folder, a path that cannot be written, the input itself, or a size that the
            encoder does not support.
    """
    writer = VideoWriter(output, source.fps) if output is not None else None
    if writer is not None and source.size is not None:
        blank = np.zeros(source.size, np.uint8)
        drawn = FrameAnnotator(palette, style or DemoStyle(), source.fps).draw(
            np.zeros((*source.size, 3), np.uint8), blank
        )
        writer.check_size(*drawn.shape[:2])
    if contact_sheet is not None:
        sheet = _sheet_path(contact_sheet)
        check_writable(sheet)
        if output is not None and sheet.absolute() == Path(output).absolute():
            raise ValueError(f"contact sheet and output are both {sheet}")
        if source.path is not None and source.path.is_dir() and sheet.resolve().parent == source.path.resolve():
            raise ValueError(f"contact sheet {sheet} would become a frame of the input {source.path}")
    for path in (Path(given) for given in (output, contact_sheet) if given is not None):
        if source.path is not None and path.exists() and os.path.samefile(path, source.path):
            raise ValueError(f"output {path} is the input, which it would replace; choose another name")
    inputs = [source.path.resolve(), source.path.resolve() / "origin"] if source.path is not None else []
    for sink in sinks:
        if isinstance(sink, LabelFolder) and sink.folder.resolve() in inputs:
            raise ValueError(f"output {sink.folder} is the input, whose frames the label maps would be; choose another")


def palette_from_config(cfg: CfgNode, dataset_name: str = "") -> Palette:
    """Names and colours of a model's classes.

    They are taken from ``dataset_name``, or else from the test or training sets of the config.
    A config without such a data set gets the names "class 0", ... and generated colours.

    Raises:
        ValueError: unknown ``dataset_name``, or one with another number of classes.
    """
    num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if dataset_name:
        check_classes(cfg, [dataset_name])
    name = dataset_name or classes_dataset(cfg, cfg.DATASETS.TEST) or classes_dataset(cfg, cfg.DATASETS.TRAIN)
    if name:
        metadata = MetadataCatalog.get(name)
        return Palette(metadata.stuff_classes, metadata.stuff_colors, metadata.ignore_label)
    logger.warning(f"no data set of the config has {num_classes} classes; they are shown as class 0, class 1, ...")
    ignore_label = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    return Palette([f"class {i}" for i in range(num_classes)], distinct_colors(num_classes), ignore_label)


def save_picture(picture: Picture, path: str | Path) -> None:
    """Write a picture; the folder is made if needed.

    Raises:
        ValueError: a suffix that is not a picture format.
    """
    path = _sheet_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    form = Image.registered_extensions()[path.suffix.lower()]
    atomic_write(path, lambda stream: Image.fromarray(picture).save(stream, format=form))


def _sheet_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"contact sheet {path}: expected a name that ends in {', '.join(PICTURE_SUFFIXES)}")
    return path


def _sheet_cell(frame: Picture, labels: Labels, palette: Palette, style: DemoStyle) -> Picture:
    height = max(1, round(frame.shape[0] * SHEET_CELL_WIDTH / frame.shape[1]))
    enlarged = frame.shape[1] < SHEET_CELL_WIDTH
    interpolation = cv2.INTER_CUBIC if enlarged else cv2.INTER_AREA
    small = cv2.resize(frame, (SHEET_CELL_WIDTH, height), interpolation=interpolation).astype(np.uint8, copy=False)
    return render.overlay(small, labels, palette, style.alpha)


def _sheet(cells: list[tuple[float, Picture]], classes: list[int], palette: Palette, style: DemoStyle) -> Picture:
    """A sheet of cells in reading order, each below its time; all frames are fitted to the first one's size."""
    height, width = cells[0][1].shape[:2]
    pictures = [
        render.titled(fit_into(cell, height, width), f"{seconds - cells[0][0]:.1f} s", style.text_size)
        for seconds, cell in cells
    ]
    columns = min(SHEET_COLUMNS, len(pictures))
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    table_width = columns * width + (columns - 1) * 6
    footer = render.legend_rows(classes, palette, table_width, style.text_size) if style.legend and classes else None
    return render.contact_sheet(rows, footer=footer)
