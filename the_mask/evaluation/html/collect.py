"""Collects the data of a report while predictions are made.

Axes: K classes, H W frame size.
"""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from numpy.typing import NDArray
from PIL import Image

from the_mask.data.classes import distinct_colors
from the_mask.data.clips import Clip
from the_mask.data.io import read_image
from the_mask.data.label_maps import as_label_array
from the_mask.data.registry import require_known
from the_mask.evaluation.metrics import confusion_matrix, iou_from_confusion
from the_mask.inference.rendering.render import Palette, colorize, overlay, resize_labels
from the_mask.inference.sinks import Sink

THUMBNAIL_WIDTH = 360
JPEG_QUALITY = 80


@dataclass
class FrameNote:
    """Figures of one frame.

    Attributes:
        name: frame id.
        miou: mean IoU over the classes of the frame's ground truth, 0..1; None without ground truth.
        flicker: share of pixels whose prediction differs from the previous frame although the ground truth (if both
            frames have one) does not; None for a first frame.
    """

    name: str
    miou: float | None
    flicker: float | None


@dataclass(order=True)
class WorstFrame:
    """A frame with its pictures, ordered by ``badness``; ``order`` breaks ties.

    Attributes:
        classes: classes of the wrong pixels (for a flicker: of the changed ones), in prediction or ground truth.
    """

    badness: float
    order: int
    video: str = field(compare=False)
    frame: str = field(compare=False)
    pictures: dict[str, str] = field(compare=False)
    classes: list[int] = field(compare=False, default_factory=list)


@dataclass
class RunReport:
    """The data of a run.

    Attributes:
        confusion: int64 [K, K], rows are ground truth.
        per_video: confusion matrix of each video.
        curves: frames of each video, in time order.
        worst: frames with the lowest mean IoU, worst first. flickers: frames with the highest flicker.
        figures: results of the evaluator, in percent.
    """

    name: str
    dataset: str
    class_names: list[str]
    colors: list[tuple[int, int, int]]
    confusion: NDArray[np.int64]
    per_video: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    curves: dict[str, list[FrameNote]] = field(default_factory=dict)
    worst: list[WorstFrame] = field(default_factory=list)
    flickers: list[WorstFrame] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


class ReportSink(Sink):
    """Collects a :class:`RunReport`. Memory is a few bytes per frame, and the kept pictures.

    Args:
        dataset: registered name.
        name: name of the run.
        pictures: number of worst frames, and of worst flickers, to keep with their pictures.
    """

    def __init__(self, dataset: str, name: str, pictures: int = 12) -> None:
        require_known(dataset)
        metadata = MetadataCatalog.get(dataset)
        names = list(metadata.stuff_classes)
        colors = [tuple(map(int, c)) for c in metadata.get("stuff_colors") or distinct_colors(len(names))]
        self.ignore_label: int = metadata.ignore_label
        self.pictures = pictures
        self.palette = Palette(names, colors, self.ignore_label)
        self.run = RunReport(name, dataset, names, colors, np.zeros((len(names),) * 2, np.int64))  # type: ignore[arg-type]
        self._before: tuple[str, NDArray[np.integer], NDArray[np.integer] | None] | None = None
        self._count = 0

    def process(self, clips: Sequence[Clip], predictions: Sequence[Sequence[Any]]) -> None:
        """Take label maps in time order."""
        for clip, maps in zip(clips, predictions, strict=True):
            for t, labels in enumerate(maps):
                truth = clip.labels[t]
                self._frame(
                    clip.video_id,
                    clip.frame_ids[t],
                    clip.file_names[t],
                    as_label_array(labels),
                    None if truth is None else as_label_array(truth),
                )

    def _frame(
        self, video: str, frame: str, file: str, labels: NDArray[np.integer], truth: NDArray[np.integer] | None
    ) -> None:
        run, miou, flicker = self.run, None, None
        wrong = changed = np.zeros(labels.shape, bool)
        if truth is not None:
            wrong = (labels != truth) & (truth != self.ignore_label)
            counts = confusion_matrix(labels, truth, len(run.class_names), self.ignore_label)
            run.confusion += counts
            run.per_video.setdefault(video, np.zeros_like(run.confusion))
            run.per_video[video] += counts
            value = iou_from_confusion(counts)["mIoU"]
            miou = None if value != value else float(value)
        if self._before is not None and self._before[0] == video and self._before[1].shape == labels.shape:
            still = np.ones(labels.shape, bool)
            if truth is not None and self._before[2] is not None:
                still = truth == self._before[2]
            changed = (labels != self._before[1]) & still
            flicker = float(changed[still].mean()) if still.any() else 0.0
        before = None if self._before is None else self._before[1]
        self._before = (video, labels, truth)
        run.curves.setdefault(video, []).append(FrameNote(frame, miou, flicker))
        if miou is not None and miou < 1:
            self._keep(run.worst, 1 - miou, video, frame, file, labels, truth, self._classes(wrong, labels, truth))
        if flicker:
            classes = self._classes(changed, labels, before)
            self._keep(run.flickers, flicker, video, frame, file, labels, truth, classes)

    def _classes(self, where: NDArray[np.bool_], *maps: NDArray[np.integer] | None) -> list[int]:
        """Classes that some label maps have at some pixels."""
        found = {int(label) for labels in maps if labels is not None for label in np.unique(labels[where])}
        return sorted(label for label in found if label < len(self.run.class_names))

    def _keep(
        self,
        kept: list[WorstFrame],
        badness: float,
        video: str,
        frame: str,
        file: str,
        labels: NDArray[np.integer],
        truth: NDArray[np.integer] | None,
        classes: list[int],
    ) -> None:
        self._count += 1
        if len(kept) >= self.pictures and (not kept or badness <= kept[0].badness):
            return
        picture = read_image(file)
        width = min(THUMBNAIL_WIDTH, picture.shape[1])
        height = max(1, round(picture.shape[0] * width / picture.shape[1]))
        small = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
        shown = {"frame": small, "prediction": overlay(small, resize_labels(labels, height, width), self.palette)}
        if truth is not None:
            shown["ground truth"] = overlay(small, resize_labels(truth, height, width), self.palette)
            wrong = np.where((labels != truth) & (truth != self.ignore_label), labels, self.ignore_label)
            shown["wrong pixels"] = colorize(resize_labels(wrong, height, width), self.palette)
        pictures = {name: _data_url(picture) for name, picture in shown.items()}
        worst = WorstFrame(badness, -self._count, video, frame, pictures, classes)
        if len(kept) < self.pictures:
            heapq.heappush(kept, worst)
        else:
            heapq.heapreplace(kept, worst)

    def report(self, figures: Mapping[str, float]) -> RunReport:
        """The data of the run, with the evaluator's figures."""
        self.run.figures = dict(figures)
        self.run.worst.sort(reverse=True)
        self.run.flickers.sort(reverse=True)
        return self.run


def _data_url(picture: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
