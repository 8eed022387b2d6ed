"""Accuracy by distance from the keyframe: each labelled frame is predicted from keyframes 0, 1, ... frames before it.

Axes: K classes, L distances. Source: the protocol of GSVNet's released code (start at frame k - i, propagate to k).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
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
from the_mask.data.clips import Clip
from the_mask.data.io import check_same_size, read_image
from the_mask.data.registry import Record
from the_mask.data.samplers import shard_videos
from the_mask.evaluation.frames import frame_clip
from the_mask.evaluation.loop import Predicted, feed
from the_mask.evaluation.metrics import confusion_matrix, iou_from_confusion
from the_mask.inference.sinks import Sink
from the_mask.inference.stream import StreamingSegmentor
from the_mask.modeling.macs import count_macs
from the_mask.modeling.propagation.propagated import PropagatedSegmentor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """A keyframe, and the distances of the scored frames after it."""

    frame: int
    distances: tuple[int, ...]


def plan_starts(labelled: Sequence[bool], distances: int) -> tuple[list[Start], int]:
    """Choose the keyframes of a video.

    Every labelled frame with ``distances - 1`` frames before it is scored once at each distance. Labelled frames closer
    to the video's start are left out, so that all points of the curve use the same frames.

    Args:
        labelled: per frame of the video.
        distances: L, at least 1.

    Returns:
        The keyframes in order, and the number of labelled frames left out.
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
        segmentor: [K, K], of the segmentor alone on the same frames.

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
    """Score a propagated model at every distance from its keyframe; a collective call if there are several processes.

    The model must be in eval mode. Each keyframe starts from an empty state, so a segmentor with a memory sees no other
    frame.

    Args:
        cfg: keys ``INPUT.TEST.*`` and ``TEST.KEYFRAME_DISTANCES``.
        model: a :class:`PropagatedSegmentor`.
        dataset_name: registered data set with videos.
        distances: L; None takes ``cfg.TEST.KEYFRAME_DISTANCES``.

    Returns:
        As :func:`summarise`, with ``frames`` (scored) and ``left_out`` (labelled, too close to a video's start).

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
    total = DistanceConfusion(distances, model.num_classes, ignore)
    mine = [records[number] for number in shard]
    feed(keyframe_predictions(cfg, model, mine, distances), [total])
    parts = comm.all_gather(total)
    for part in parts[1:]:
        parts[0].add(part)
    whole: DistanceConfusion = parts[0]
    if not whole.frames:
        raise ValueError(
            f"{dataset_name} has no labelled frame with {distances - 1} frames before it: lower "
            "TEST.KEYFRAME_DISTANCES, or use a data set with the frames between labels"
        )
    results = summarise(whole.confusions, whole.segmentor)
    left_out = sum(plan_starts(_labelled(record), distances)[1] for record in records)
    results.update(frames=whole.frames, left_out=left_out)
    logger.info("keyframes on %s: %s", dataset_name, ", ".join(f"{k} {v:.2f}" for k, v in results.items()))
    return results


@dataclass(frozen=True, eq=False)
class DistantFrame(Clip):
    """A clip of one frame that was predicted from a keyframe.

    Attributes:
        distance: frames from the keyframe; None for a frame that the segmentor predicted alone.
    """

    distance: int | None = None


class DistanceConfusion(Sink):
    """The sink for :func:`keyframe_predictions`: confusion matrices by distance, and of the segmentor alone.

    Attributes:
        confusions: int64 [L, K, K].
        segmentor: int64 [K, K].
        frames: number of scored frames.
    """

    def __init__(self, distances: int, num_classes: int, ignore_label: int) -> None:
        self.confusions = np.zeros((distances, num_classes, num_classes), dtype=np.int64)
        self.segmentor = np.zeros((num_classes, num_classes), dtype=np.int64)
        self.ignore_label = ignore_label
        self.frames = 0

    def process(self, clips: Sequence[Clip], predictions: Sequence[Sequence[Any]]) -> None:
        """Count label maps. A clip's ``distance`` is None for the segmentor alone."""
        for clip, (labels,) in zip(clips, predictions, strict=True):
            assert isinstance(clip, DistantFrame)
            distance = clip.distance
            matrix = self.segmentor if distance is None else self.confusions[distance]
            truth, source = clip.labels[0], clip.file_names[0]
            matrix += confusion_matrix(labels, truth, len(self.segmentor), self.ignore_label, source)
            self.frames += distance is None

    def add(self, other: DistanceConfusion) -> None:
        """Add the counts of another process."""
        self.confusions += other.confusions
        self.segmentor += other.segmentor
        self.frames += other.frames


def keyframe_predictions(
    cfg: CfgNode, model: PropagatedSegmentor, records: Sequence[Record], distances: int
) -> Iterator[Predicted]:
    """Labelled frames of some videos, as clips of one frame with their ``distance`` from the keyframe, and label maps.

    Each frame also comes once with ``distance`` None, predicted by the segmentor alone.
    """
    stream, alone = StreamingSegmentor(cfg, model=model), StreamingSegmentor(cfg, model=model.segmentor)
    for record in records:
        # Cache of frames and clips that are still needed.
        kept: dict[int, tuple[torch.Tensor, Clip]] = {}
        for start in plan_starts(_labelled(record), distances)[0]:
            kept = {index: frame for index, frame in kept.items() if index >= start.frame}
            state = model.init_state()
            for distance in range(max(start.distances) + 1):
                index = start.frame + distance
                if index not in kept:
                    kept[index] = _read(stream, record, index)
                pixels, clip = kept[index]
                with torch.no_grad():
                    if distance:
                        (state,) = model.propagate(model.small_frames([pixels]), [state])
                    else:
                        (state,) = model.key_step([pixels], [state])
                    if distance not in start.distances:
                        continue
                    sizes = (pixels.shape[1], pixels.shape[2]), clip.labels[0].shape
                    labels = stream.finish(model.output(state), *sizes)
                yield [DistantFrame(**vars(clip), distance=distance)], [[labels]]
                if distance == 0:
                    (scores,) = model.segmentor.score_maps([Clip([pixels])])
                    yield [DistantFrame(**vars(clip))], [[alone.finish(scores[0], *sizes)]]


def _read(stream: StreamingSegmentor, record: Record, index: int) -> tuple[torch.Tensor, Clip]:
    """Read a frame [3, H, W] at network size, and its clip."""
    clip = frame_clip(record, index)
    image, labels = read_image(clip.file_names[0]), clip.labels[0]
    if labels is not None:
        check_same_size(image, labels, clip.file_names[0], str(clip.mask_file_names[0]))
    return stream.prepare(image), clip


def _labelled(record: Record) -> list[bool]:
    return [frame["sem_seg_file_name"] is not None for frame in record["frames"]]


def propagation_macs(model: PropagatedSegmentor, size: tuple[int, int]) -> tuple[int, int]:
    """Multiply-adds of a keyframe and of a propagated frame of ``size`` (H, W), the keyframe at ``key_scale``."""
    segmentor: Any = model.segmentor
    frame = torch.zeros(3, *size, device=model.device)
    key = [max(1, round(side * model.options.key_scale)) for side in size]
    images, _ = segmentor.stack([Clip([torch.zeros(3, *key, device=model.device)])])
    small = model.small_frames([frame])[0][None]
    scores = torch.zeros(1, model.num_classes, *small.shape[-2:], device=model.device)
    return (
        count_macs(segmentor, lambda: segmentor.sem_seg_head(segmentor.backbone(images))),
        count_macs(model.propagator, lambda: model.propagator(scores, small, small)),
    )


def average_macs(key: float, non_key: float, interval: int) -> float:
    """Mean over one keyframe and ``interval - 1`` propagated frames.

    Raises:
        ValueError: ``interval`` below 1.
    """
    if interval < 1:
        raise ValueError(f"a keyframe interval of {interval} frames; expected >= 1")
    return (key + (interval - 1) * non_key) / interval
