"""Accuracy by distance from the keyframe: each labelled frame is reached from keyframes 0, 1, ... frames before it.

Axes: K classes, L distances. Source: the protocol of GSVNet's released code (start at frame k - i, propagate to k).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from numpy.typing import NDArray
from torch import nn

from the_mask.data import get_records
from the_mask.data.augmentation import fit_size, resize_image, round_up
from the_mask.data.io import check_same_size, read_image, read_label
from the_mask.data.samplers import shard_videos
from the_mask.evaluation.metrics import confusion_matrix, iou_from_confusion
from the_mask.modeling.propagation.propagated import PropagatedSegmentor
from the_mask.modeling.scores import label_map

logger = logging.getLogger(__name__)
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Start:
    """A keyframe, and the distances at which frames after it are scored."""

    frame: int
    distances: tuple[int, ...]


def plan_starts(labelled: Sequence[bool], distances: int) -> tuple[list[Start], int]:
    """Which frames of a video become keyframes.

    Every labelled frame with ``distances - 1`` frames before it is scored once at each distance; labelled frames nearer
    to the video's start are left out, so that all points of the curve rest on the same frames.

    Args:
        labelled: per frame of the video.
        distances: L, at least 1.

    Returns:
        keyframes in order, and how many labelled frames were left out.
    """
    wanted = {k for k, has in enumerate(labelled) if has and k >= distances - 1}
    starts = []
    for frame in range(len(labelled)):
        reached = tuple(i for i in range(distances) if frame + i in wanted)
        if reached:
            starts.append(Start(frame, reached))
    return starts, sum(labelled) - len(wanted)


def summarise(confusions: NDArray[np.int64], segmentor: NDArray[np.int64] | None = None) -> OrderedDict[str, float]:
    """Figures of the curve, in percent.

    Args:
        confusions: [L, K, K], one matrix per distance.
        segmentor: [K, K] of the segmentor alone, on the same frames.

    Returns:
        ``mIoU`` (mean of the distances'), ``mIoU_pooled`` (of the summed matrix, as GSVNet's released code averages),
        ``mIoU_min`` (the farthest distance), ``mIoU_0`` ..., and with ``segmentor``: ``mIoU_segmentor``, without
        the working grid, and ``grid_loss``, what the grid costs at distance 0.
    """
    curve = [100 * iou_from_confusion(matrix)["mIoU"] for matrix in confusions]
    result = OrderedDict(
        mIoU=float(np.mean(curve)),
        mIoU_pooled=100 * iou_from_confusion(confusions.sum(axis=0))["mIoU"],
        mIoU_min=curve[-1],
    )
    result.update({f"mIoU_{distance}": value for distance, value in enumerate(curve)})
    if segmentor is not None:
        result["mIoU_segmentor"] = 100 * iou_from_confusion(segmentor)["mIoU"]
        result["grid_loss"] = result["mIoU_segmentor"] - curve[0]
    return result


def evaluate_keyframes(
    cfg: CfgNode, model: nn.Module, dataset_name: str, distances: int | None = None
) -> OrderedDict[str, float]:
    """Score a propagated model at every distance from its keyframe; a collective call under several processes.

    The model must be in eval mode. Each keyframe starts from an empty state: a segmentor that looks back sees it alone.

    Args:
        cfg: keys ``INPUT.TEST.*`` and ``TEST.KEYFRAME_DISTANCES``.
        model: a :class:`PropagatedSegmentor`.
        dataset_name: registered data set with videos.
        distances: L; None takes ``cfg.TEST.KEYFRAME_DISTANCES``.

    Returns:
        As :func:`summarise`, with ``frames`` (scored) and ``left_out`` (labelled, too near to a video's start).

    Raises:
        ValueError: another kind of model, L below 1, or no labelled frame with L - 1 frames before it.
    """
    if not isinstance(model, PropagatedSegmentor):
        raise ValueError(
            f"TEST.KEYFRAME_DISTANCES needs MODEL.META_ARCHITECTURE PropagatedSegmentor, not {type(model).__name__}"
        )
    distances = cfg.TEST.KEYFRAME_DISTANCES if distances is None else distances
    if distances < 1:
        raise ValueError(f"TEST.KEYFRAME_DISTANCES is {distances}; expected at least 1")
    records = get_records(dataset_name)
    shard = shard_videos([len(record["frames"]) for record in records], comm.get_world_size())[comm.get_rank()]
    ignore = MetadataCatalog.get(dataset_name).ignore_label
    total = _Counts(distances, model.num_classes)
    for number in shard:
        _score_video(cfg, model, records[number], total, ignore)
    parts = comm.all_gather(total)
    for part in parts[1:]:
        parts[0].add(part)
    whole: _Counts = parts[0]
    if not whole.frames:
        raise ValueError(
            f"{dataset_name} has no labelled frame with {distances - 1} frames before it: lower "
            "TEST.KEYFRAME_DISTANCES, or use a data set with the frames between labels"
        )
    results = summarise(whole.confusions, whole.segmentor)
    results.update(frames=whole.frames, left_out=whole.left_out)
    logger.info("keyframes on %s: %s", dataset_name, ", ".join(f"{k} {v:.2f}" for k, v in results.items()))
    return results


class _Counts:
    """Confusion matrices and counts of one process."""

    def __init__(self, distances: int, num_classes: int) -> None:
        self.confusions = np.zeros((distances, num_classes, num_classes), dtype=np.int64)
        self.segmentor = np.zeros((num_classes, num_classes), dtype=np.int64)
        self.frames = 0
        self.left_out = 0

    def add(self, other: _Counts) -> None:
        self.confusions += other.confusions
        self.segmentor += other.segmentor
        self.frames += other.frames
        self.left_out += other.left_out


@torch.no_grad()
def _score_video(cfg: CfgNode, model: PropagatedSegmentor, record: Record, total: _Counts, ignore_label: int) -> None:
    labelled = [frame["sem_seg_file_name"] is not None for frame in record["frames"]]
    starts, left_out = plan_starts(labelled, len(total.confusions))
    total.left_out += left_out
    window = _Window(cfg, record)
    for start in starts:
        window.forget_before(start.frame)
        frame, _ = window.read(start.frame)
        (state,) = model.key_step([frame], [model.init_state()])
        for distance in range(max(start.distances) + 1):
            frame, labels = window.read(start.frame + distance)
            if distance:
                (state,) = model.propagate(model.small_frames([frame]), [state])
            if distance not in start.distances:
                continue
            assert labels is not None
            source = record["frames"][start.frame + distance]["file_name"]
            sizes = (frame.shape[1], frame.shape[2]), (labels.shape[0], labels.shape[1])
            predicted = label_map(model.output(state), *sizes, model.score_stride)
            counts = confusion_matrix(predicted, labels, model.num_classes, ignore_label, source)
            total.confusions[distance] += counts
            if distance == 0:
                (alone,) = model.segmentor.score_maps([{"frames": [frame]}])
                plain = label_map(alone[0], *sizes, model.segmentor.score_stride)
                total.segmentor += confusion_matrix(plain, labels, model.num_classes, ignore_label, source)
                total.frames += 1


class _Window:
    """Frames and labels of a video, read once and kept while they may be needed."""

    def __init__(self, cfg: CfgNode, record: Record) -> None:
        self.box = (cfg.INPUT.TEST.LONG_EDGE, cfg.INPUT.TEST.SHORT_EDGE)
        self.multiple = cfg.INPUT.TEST.SIZE_MULTIPLE
        self.record = record
        self.label_table = MetadataCatalog.get(record["dataset"]).label_table
        self.kept: dict[int, tuple[torch.Tensor, NDArray[Any] | None]] = {}

    def forget_before(self, index: int) -> None:
        for old in [i for i in self.kept if i < index]:
            del self.kept[old]

    def read(self, index: int) -> tuple[torch.Tensor, NDArray[Any] | None]:
        """Frame [3, H, W] at network size, and labels [height, width] at their own."""
        if index not in self.kept:
            frame = self.record["frames"][index]
            image, labels = read_image(frame["file_name"]), None
            if frame["sem_seg_file_name"] is not None:
                labels = read_label(frame["sem_seg_file_name"], self.label_table)
                check_same_size(image, labels, frame["file_name"], frame["sem_seg_file_name"])
            size = round_up(fit_size(image.shape[0], image.shape[1], self.box), self.multiple)
            pixels = np.ascontiguousarray(resize_image(image, size).transpose(2, 0, 1))
            self.kept[index] = torch.from_numpy(pixels), labels
        return self.kept[index]
