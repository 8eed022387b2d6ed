"""Video evaluator with constant memory: takes label maps clip by clip and keeps only sums.

Axes: ``T`` frames of a clip, ``K`` classes, ``H W`` original frame size.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from numpy.typing import NDArray

from the_mask.data.class_pixels import class_warnings
from the_mask.data.clips import Clip, as_clips
from the_mask.data.io import read_image, read_label_raw
from the_mask.data.label_maps import as_label_array
from the_mask.evaluation.boundary import BoundaryIoU
from the_mask.evaluation.metrics import confusion_matrix, iou_from_confusion
from the_mask.evaluation.report import class_table, summary_table
from the_mask.evaluation.temporal_consistency import FlowFunction, TemporalConsistency
from the_mask.evaluation.video_consistency import COMPAT_MIN_FRAMES, MODES, Mode, VideoConsistency
from the_mask.inference.sinks import Sink

logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """Numbers of videos and frames processed by an evaluator."""

    videos: int = 0
    frames: int = 0
    frames_without_labels: int = 0
    frames_without_labelled_pixels: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass
class Totals:
    """Sums over finished videos, of one process or of all, from which the figures are computed."""

    confusion: NDArray[np.int64]
    consistency: dict[Mode, VideoConsistency]
    temporal_confusion: dict[str, NDArray[np.int64]] | None
    counts: Counts
    boundary: BoundaryIoU | None = None

    def merge(self, other: Totals) -> None:
        """Add the sums of another process."""
        self.confusion = self.confusion + other.confusion
        # One process may have left out a mode.
        self.consistency = {mode: meter for mode, meter in self.consistency.items() if mode in other.consistency}
        for mode, meter in self.consistency.items():
            meter.merge(other.consistency[mode])
        if self.temporal_confusion is not None and other.temporal_confusion is not None:
            for name, counts in other.temporal_confusion.items():
                self.temporal_confusion[name] = self.temporal_confusion[name] + counts
        if self.boundary is not None and other.boundary is not None:
            self.boundary.merge(other.boundary)
        self.counts = self.counts + other.counts


@dataclass
class _Frame:
    """A predicted frame: class ids [H, W], ground truth [H, W] or None, and the files of image and mask."""

    pred: NDArray[np.integer]
    gt: NDArray[np.integer] | None
    frame_id: str
    file_name: str
    mask_file_name: str | None


@dataclass
class _Video:
    """The current video: the next frame to process, and frames that came early."""

    video_id: str
    next_index: int = 0
    early: dict[int, _Frame] = field(default_factory=dict)
    gt_shape: tuple[int, ...] | None = None


class VideoSemSegEvaluator(Sink):
    """Computes mIoU and other IoU figures, VC_n in all modes, and TC, pooled over a data set of videos.

    The clips of a video must be consecutive, but their frames need not be in time order: early ones wait in a buffer of
    at most ``max_pending`` frames. So memory depends on the frame size and the tiling, not on the data set. With
    several processes, each one processes whole videos; :meth:`evaluate` adds up their sums and returns identical
    results on every process, however the videos were split.

    Args:
        dataset_name: name in ``MetadataCatalog``; its ``stuff_classes``, ``ignore_label``, ``label_table`` are used.
        windows: window lengths n of VC_n; empty leaves VC out.
        max_pending: frames that may wait for an earlier one; ``CLIP_LENGTH * CLIP_STRIDE`` of the tiling suffices.
        flow: optical flow for TC (see ``raft_flow``); ``None`` leaves TC out of the results.
        tc_videos: ids of the videos used for TC; ``None`` takes all.
        boundary_ratio: width of the boundary for boundary IoU, as a share of the frame's diagonal (paper: 0.02); 0
            leaves it out.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        windows: Sequence[int] = (8, 16),
        max_pending: int = 256,
        flow: FlowFunction | None = None,
        tc_videos: set[str] | None = None,
        boundary_ratio: float = 0.0,
    ) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        self.dataset_name = dataset_name
        self.class_names: list[str] = list(metadata.stuff_classes)
        self.ignore_label: int = metadata.ignore_label
        self.num_classes = len(self.class_names)
        self.windows = tuple(windows)
        self.max_pending = max_pending
        # Whether several stored values have the same train id (VSPW: 0 and 255 are both ignored).
        mapped = [train_id for train_id in metadata.label_table if train_id >= 0]
        self._loses_values = len(set(mapped)) < len(mapped)
        self._flow = flow
        self._tc_videos = tc_videos
        self.boundary_ratio = boundary_ratio
        self.reset()

    def reset(self) -> None:
        """Discard all sums."""
        self.confusion = np.zeros((self.num_classes, self.num_classes), dtype=np.int64)
        self.counts = Counts()
        modes = MODES if self.windows else ()
        self._consistency = {mode: VideoConsistency(self.windows, mode, self.ignore_label) for mode in modes}
        self._temporal = TemporalConsistency(self.num_classes, self._flow, self.ignore_label) if self._flow else None
        ratio = self.boundary_ratio
        self._boundary = BoundaryIoU(self.num_classes, ratio, self.ignore_label) if ratio else None
        self._video: _Video | None = None
        self.totals: Totals | None = None

    def process(self, clips: Sequence[Clip | Mapping[str, Any]], predictions: Sequence[Any]) -> None:
        """Add predicted clips.

        Args:
            clips: test clips, or dicts with their fields; ``mask_file_names`` give VC its raw values.
            predictions: per clip T label maps [H, W], or ``{"sem_seg": T score maps [K, H, W]}``.

        Raises:
            ValueError: wrong number of maps, wrong size, illegal class ids, a frame predicted twice, or a missing
                frame; the message names the frame.
        """
        if len(clips) != len(predictions):
            raise ValueError(f"{len(clips)} clips, but predictions for {len(predictions)}")
        for clip, prediction in zip(as_clips(clips), predictions, strict=True):
            maps = _label_maps(prediction)
            if len(maps) != len(clip.frame_ids):
                raise ValueError(
                    f"video {clip.video_id}: {len(maps)} label maps for a clip of {len(clip.frame_ids)} frames"
                )
            video = self._current_video(clip.video_id)
            for position, index in enumerate(clip.frame_indices):
                labels = clip.labels[position] if clip.labels else None
                frame = _Frame(
                    maps[position],
                    None if labels is None else as_label_array(labels, "ground truth"),
                    clip.frame_ids[position],
                    clip.file_names[position],
                    clip.mask_file_names[position] if clip.mask_file_names else None,
                )
                self._place(video, int(index), frame)
            if clip.is_last:
                self.end_video()

    def _current_video(self, video_id: str) -> _Video:
        if self._video is not None and self._video.video_id != video_id:
            self.end_video()
        if self._video is None:
            self._video = _Video(video_id)
        return self._video

    def _place(self, video: _Video, index: int, frame: _Frame) -> None:
        """Store a frame at its position, and process all frames that are now in order."""
        if index < video.next_index or index in video.early:
            raise ValueError(f"video {video.video_id}: frame {index} ({frame.frame_id}) is predicted twice")
        video.early[index] = frame
        while video.next_index in video.early:
            self._add_frame(video, video.early.pop(video.next_index))
            video.next_index += 1
        if len(video.early) > self.max_pending:
            raise ValueError(
                f"video {video.video_id}: frame {video.next_index} is still missing while {len(video.early)} later "
                f"ones wait; the clips of a video must tile it within {self.max_pending} frames"
            )

    def _add_frame(self, video: _Video, frame: _Frame) -> None:
        source = f"video {video.video_id}, frame {frame.frame_id} ({frame.file_name})"
        self.counts.frames += 1
        self._add_temporal(video, frame)
        if frame.gt is None:
            # A window cannot cross a frame without ground truth.
            self.counts.frames_without_labels += 1
            self._cut_windows(video)
            return
        frame_confusion = confusion_matrix(frame.pred, frame.gt, self.num_classes, self.ignore_label, source)
        self.confusion += frame_confusion
        self.counts.frames_without_labelled_pixels += not frame_confusion.any()
        if self._boundary is not None:
            self._boundary.update(frame.pred, frame.gt)
        if video.gt_shape not in (None, frame.gt.shape):
            logger.warning(f"{source}: the size changes to {frame.gt.shape}; consistency windows restart")
            self._cut_windows(video)
        video.gt_shape = frame.gt.shape
        self._feed_consistency(frame)

    def _feed_consistency(self, frame: _Frame) -> None:
        assert frame.gt is not None
        if self._loses_values and frame.mask_file_name is None and "compat-vspw" in self._consistency:
            del self._consistency["compat-vspw"]
            logger.warning(
                f"{self.dataset_name}: several values of a mask mean one train id and clips have no mask_file_names: "
                "VC as VSPW's script counts it is left out"
            )
        for mode, meter in self._consistency.items():
            stored = mode == "compat-vspw" and self._loses_values
            meter.update(frame.pred, read_label_raw(str(frame.mask_file_name)) if stored else frame.gt)

    def _add_temporal(self, video: _Video, frame: _Frame) -> None:
        if self._temporal is None or not (self._tc_videos is None or video.video_id in self._tc_videos):
            return
        image = read_image(frame.file_name)
        if image.shape[:2] != self._temporal.last_shape:
            self._temporal.end_video()
        self._temporal.update(image, frame.pred)

    def _cut_windows(self, video: _Video) -> None:
        for meter in self._consistency.values():
            meter.end_video()
        video.gt_shape = None

    def end_video(self) -> None:
        """End the current video (also done by ``is_last`` and by the first clip of another video).

        Raises:
            ValueError: a frame before the last one was never predicted.
        """
        video = self._video
        if video is None:
            return
        if video.early:
            missing = sorted(set(range(max(video.early))) - set(video.early) - set(range(video.next_index)))
            raise ValueError(f"video {video.video_id} ended without a prediction for frames {missing}")
        self._cut_windows(video)
        if self._temporal is not None:
            self._temporal.end_video()
        self.counts.videos += 1
        self._video = None

    def evaluate(self, expected_frames: int | None = None) -> OrderedDict[str, dict[str, float]]:
        """Add up the sums of all processes and compute the figures.

        Args:
            expected_frames: number of frames of the data set; another number of processed frames is an error.

        Returns:
            ``{"sem_seg": {...}}`` in percent, on every process: ``mIoU`` (classes with ground truth), ``mIoU_union``
            (classes with non-zero union), ``fwIoU``, ``pACC``, ``mACC``, ``VC<n>`` (strict), ``VC<n>_compat``
            (CFFM's script), ``VC<n>_compat-vspw`` (VSPW's), ``TC`` and ``TC_compat`` if a flow was given, ``BIoU`` if
            configured, and ``IoU-<class>``. NaN where nothing was counted.
            After the call :attr:`totals` holds the sums.

        Raises:
            ValueError: frames are missing, or were predicted more than once.
        """
        self.end_video()
        parts = comm.all_gather(self.local_totals())
        totals = parts[0]
        for part in parts[1:]:
            totals.merge(part)
        if expected_frames is not None and totals.counts.frames != expected_frames:
            raise ValueError(
                f"{self.dataset_name} has {expected_frames} frames, but {totals.counts.frames} were predicted; "
                "videos must be split over processes without loss or overlap"
            )
        results = self.results(totals)
        self.totals = totals
        if comm.is_main_process():
            logger.info(self._report(totals, results))
        return OrderedDict(sem_seg=results)

    def local_totals(self) -> Totals:
        """A copy of the sums over the videos this process has finished."""
        return Totals(
            self.confusion.copy(),
            {mode: meter.finished() for mode, meter in self._consistency.items()},
            None if self._temporal is None else copy.deepcopy(self._temporal.confusion),
            replace(self.counts),
            copy.deepcopy(self._boundary),
        )

    def results(self, totals: Totals) -> dict[str, float]:
        """The figures of :meth:`evaluate` for given sums."""
        report = iou_from_confusion(totals.confusion)
        figures = {
            "mIoU": report["mIoU"],
            "mIoU_union": report["mIoU_union"],
            "fwIoU": report["fwIoU"],
            "pACC": report["pACC"],
            "mACC": report["mACC"],
        }
        for mode, meter in totals.consistency.items():
            figures.update({f"VC{window}{_suffix(mode)}": value for window, value in meter.result().items()})
        if totals.temporal_confusion is not None:
            for way, confusion in totals.temporal_confusion.items():
                figures[f"TC{_suffix(way)}"] = iou_from_confusion(confusion)["mIoU"]
        if totals.boundary is not None:
            figures["BIoU"] = totals.boundary.result()
        figures.update({f"IoU-{name}": float(iou) for name, iou in zip(self.class_names, report["IoU"], strict=True)})
        return {name: 100 * value for name, value in figures.items()}

    def _report(self, totals: Totals, results: dict[str, float]) -> str:
        counts = totals.counts
        parts = [
            f"{self.dataset_name}: {counts.videos} videos, {counts.frames} frames, of them "
            f"{counts.frames_without_labels} without labels, {counts.frames_without_labelled_pixels} all void",
            class_table(iou_from_confusion(totals.confusion), self.class_names),
            summary_table(results),
        ]
        labelled = totals.confusion.sum(axis=1)
        if np.count_nonzero(labelled) == 1:
            parts.append(*class_warnings(self.class_names, labelled, {}, " in the ground truth"))
        compat = totals.consistency.get("compat")
        if compat is not None and compat.skipped_videos:
            parts.append(
                f"VC_compat leaves out {compat.skipped_videos} videos (or labelled parts of one) of fewer than "
                f"{COMPAT_MIN_FRAMES} frames, as CFFM's script does"
            )
        if totals.temporal_confusion is None:
            parts.append("TC: not computed (give flow weights by TEST.TC_FLOW_WEIGHTS)")
        return "\n\n".join(parts)


def _suffix(mode: str) -> str:
    return "" if mode == "strict" else f"_{mode}"


def _label_maps(prediction: Any) -> list[NDArray[np.integer]]:
    """T label maps from a segmentor's result for a clip: label maps, or ``{"sem_seg": T score maps}``."""
    if isinstance(prediction, Mapping):
        prediction = [torch.as_tensor(scores).argmax(dim=0) for scores in prediction["sem_seg"]]
    return [as_label_array(labels, "prediction") for labels in prediction]
