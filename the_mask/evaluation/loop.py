"""The prediction loop: runs over the frames of a data set and passes label maps to sinks.

Predictions come from a source, an iterator of clips with their label maps: a model on videos, keyframes at every
distance, or files on disk. Sinks consume them: metrics, PNGs, samples, reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch import nn

from the_mask.data import build_test_loader
from the_mask.data.clips import Clip
from the_mask.data.io import check_same_size, read_image
from the_mask.data.samplers import shard_videos
from the_mask.data.video_tree import Record
from the_mask.evaluation.frames import single_frame_clips
from the_mask.evaluation.progress import ProgressMeter
from the_mask.inference.compose import build_stream, is_plain, must_stream
from the_mask.inference.sinks import Sink
from the_mask.modeling.freezing import evaluation_mode
from the_mask.modeling.stream import Hints, Stream, StreamState

# Clips of the test loader, and for each its label maps [height, width] or scores [K, height, width].
Predicted = tuple[Sequence[Clip], Sequence[Sequence[Any]]]
Clock = Callable[[], AbstractContextManager[None]]


def feed(predictions: Iterable[Predicted], sinks: Sequence[Sink], meter: ProgressMeter | None = None) -> int:
    """Pass all predictions to all sinks, and close these, also after an error. Returns the number of frames."""
    frames = 0
    with ExitStack() as stack:
        for sink in sinks:
            stack.callback(sink.close)
        for clips, maps in predictions:
            for sink in sinks:
                sink.process(clips, maps)
            count = sum(len(own) for own in maps)
            frames += count
            if meter is not None:
                meter.update(count)
    return frames


def predict_videos(
    cfg: CfgNode, model: nn.Module, dataset_name: str, records: Sequence[Record], sinks: Sequence[Sink]
) -> int:
    """Predict every frame of some videos as configured by ``cfg.TEST``; each process takes a share of the videos.

    Clips come from ``build_test_loader``; with ``TEST.STREAMING``, each video is processed frame by frame as a stream
    instead. In both cases, keys such as ``TEST.VIEWS`` wrap the model by :func:`build_stream`; ensembles and stages
    always stream. Memory does not grow with the data set. The model is switched to eval mode, and every module's mode
    is restored afterwards, even after an error.

    Args:
        cfg: keys ``TEST.*`` and ``INPUT.TEST.*``.
        model: has ``predict(clips)``; may be wrapped in DistributedDataParallel.
        dataset_name: registered data set.
        records: videos of the data set.
        sinks: consumers of the label maps.

    Returns:
        The number of frames of this process.
    """
    lengths = [len(record["frames"]) for record in records]
    mine = [records[i] for i in shard_videos(lengths, comm.get_world_size())[comm.get_rank()]]
    model = unwrap(model)
    meter = ProgressMeter(dataset_name, sum(len(record["frames"]) for record in mine))
    with evaluation_mode(model), torch.no_grad(), meter:
        predictor: Any = model
        if must_stream(cfg) or not is_plain(cfg):
            predictor = build_stream(cfg, model, MetadataCatalog.get(dataset_name).stuff_classes)
        if must_stream(cfg):
            source = stream_videos(predictor, mine, meter.model_time)
        else:
            source = tile_videos(cfg, predictor, dataset_name, records, meter.model_time)
        return feed(source, sinks, meter)


def tile_videos(
    cfg: CfgNode, predictor: Any, dataset_name: str, records: Sequence[Record] | None = None, clock: Clock = nullcontext
) -> Iterator[Predicted]:
    """Clips of the test loader with their label maps.

    Args:
        cfg: keys ``TEST.*`` and ``INPUT.TEST.*``.
        predictor: has ``predict(clips)``.
        dataset_name: registered data set.
        records: videos of the data set; default: all.
        clock: context that is entered while the model runs.
    """
    for clips in build_test_loader(cfg, dataset_name, records):
        with clock():
            maps = predictor.predict(clips)
        yield clips, maps


def stream_videos(stream: Stream, records: Sequence[Record], clock: Clock = nullcontext) -> Iterator[Predicted]:
    """Process videos frame by frame, each from a new state; yields clips of one frame with the stream's output.

    Raises:
        ValueError, FileNotFoundError: unreadable image or mask, or one of another size; the message names the file.
    """
    state: StreamState = {}
    for clip in single_frame_clips(records):
        if clip.is_first:
            state = stream.init_state()
        file_name, labels = clip.file_names[0], clip.labels[0]
        image = read_image(file_name)
        if labels is not None:
            check_same_size(image, labels, file_name, str(clip.mask_file_names[0]))
        with clock(), torch.no_grad():
            output, state = stream.step(image, state, Hints(name=(clip.video_id, clip.frame_ids[0])))
        yield [clip], [[output]]


def unlabelled(records: Sequence[Record]) -> list[Record]:
    """The records without ground truth, so that a prediction does not read it."""
    return [
        {**record, "frames": [{**frame, "sem_seg_file_name": None} for frame in record["frames"]]} for record in records
    ]


def unwrap(model: nn.Module) -> nn.Module:
    """The segmentor inside a wrapper such as DistributedDataParallel."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) and not hasattr(model, "predict") else model
