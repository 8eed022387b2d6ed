"""Run a model over a test set and score it: loader -> ``model.predict`` (or a stream) -> evaluator."""

from __future__ import annotations

import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch import nn
from tqdm import tqdm

from the_mask.data import build_test_loader, get_records
from the_mask.data.class_names import check_classes
from the_mask.data.io import check_same_size, read_image
from the_mask.data.samplers import shard_videos
from the_mask.data.video_tree import Record
from the_mask.evaluation.claims import disclaim
from the_mask.evaluation.evaluator import VideoSemSegEvaluator
from the_mask.evaluation.frames import single_frame_clips
from the_mask.evaluation.keyframe import evaluate_keyframes
from the_mask.evaluation.temporal_consistency import raft_flow
from the_mask.inference.compose import build_stream, is_plain, must_stream
from the_mask.modeling.stream import Hints, Stream

logger = logging.getLogger(__name__)
Clip = dict[str, Any]
Predicted = tuple[list[Clip], list[list[Any]]]
LOG_SECONDS = 10.0


def evaluate_dataset(cfg: CfgNode, model: nn.Module, dataset_name: str) -> OrderedDict[str, dict[str, float]]:
    """Predict every frame of a test set and score it; a collective call when there are several processes.

    Clips come from ``build_test_loader``; with ``cfg.TEST.STREAMING`` each video is fed frame by frame through
    a stream instead. With keys such as ``TEST.VIEWS`` the model runs inside what :func:`build_stream` makes of it,
    either way; ensembles and stages always stream. Memory does not grow with the data set. The model is switched to
    eval mode and every module's mode is restored afterwards, also after an error.

    Args:
        cfg: keys ``TEST.*`` and ``INPUT.TEST.*``.
        model: has ``predict(clips)``; may be wrapped in DistributedDataParallel.
        dataset_name: registered data set.

    Returns:
        As :meth:`VideoSemSegEvaluator.evaluate`, on every process; with ``TEST.KEYFRAME_DISTANCES`` also ``keyframe``,
        see :func:`the_mask.evaluation.keyframe.evaluate_keyframes`.

    Raises:
        ValueError, FileNotFoundError: unknown data set, classes that do not fit the model, bad files (named).
    """
    check_classes(cfg, [dataset_name])
    records = get_records(dataset_name)
    lengths = [len(record["frames"]) for record in records]
    shard = shard_videos(lengths, comm.get_world_size())[comm.get_rank()]
    plain = unwrap(model)
    evaluator = build_evaluator(cfg, dataset_name, records, _device(plain))
    meter = ProgressMeter(dataset_name, sum(lengths[i] for i in shard))
    with evaluation_mode(plain), torch.no_grad(), meter:
        if must_stream(cfg):
            predicted = stream_videos(make_stream(cfg, plain, dataset_name), [records[i] for i in shard], meter)
        else:
            predictor = plain if is_plain(cfg) else make_stream(cfg, plain, dataset_name)
            predicted = tile_videos(cfg, predictor, dataset_name, meter)
        for clips, maps in predicted:
            evaluator.process(clips, maps)
            meter.update(sum(len(frames) for frames in maps))
        by_distance = evaluate_keyframes(cfg, plain, dataset_name) if cfg.TEST.KEYFRAME_DISTANCES else None
    results = evaluator.evaluate(expected_frames=sum(lengths))
    if by_distance is not None:
        results["keyframe"] = by_distance
    return results


def build_evaluator(
    cfg: CfgNode, dataset_name: str, records: Sequence[Record], device: torch.device | str = "cpu"
) -> VideoSemSegEvaluator:
    """Evaluator with the settings of ``cfg.TEST``; the flow of TC runs on ``device``."""
    weights, tc_videos = cfg.TEST.TC_FLOW_WEIGHTS, cfg.TEST.TC_MAX_VIDEOS
    save_dir = Path(cfg.TEST.SAVE_PREDICTIONS) if cfg.TEST.SAVE_PREDICTIONS else None
    if save_dir is not None and len(cfg.DATASETS.TEST) > 1:
        save_dir = save_dir / dataset_name
    for written in (save_dir, cfg.TEST.SAVE_SCORES):
        if written:
            disclaim(written)
    return VideoSemSegEvaluator(
        dataset_name,
        windows=cfg.TEST.VC_WINDOWS,
        # A block of the tiling, and the clips of a batch may finish it together.
        max_pending=cfg.TEST.CLIP_LENGTH * cfg.TEST.CLIP_STRIDE,
        save_dir=save_dir,
        flow=raft_flow(weights, device) if weights else None,
        tc_videos={record["video_id"] for record in records[:tc_videos]} if tc_videos else None,
        boundary_ratio=cfg.TEST.BOUNDARY_RATIO,
    )


def tile_videos(cfg: CfgNode, model: Any, dataset_name: str, meter: ProgressMeter) -> Iterator[Predicted]:
    """Clips of the test loader with their label maps."""
    for clips in build_test_loader(cfg, dataset_name):
        with meter.model_time():
            maps = model.predict(clips)
        yield clips, maps


def make_stream(cfg: CfgNode, model: nn.Module, dataset_name: str) -> Stream:
    """The stream that ``cfg`` makes of a model, with a data set's classes."""
    return build_stream(cfg, model, MetadataCatalog.get(dataset_name).stuff_classes)


def stream_videos(stream: Stream, records: Sequence[Record], meter: ProgressMeter) -> Iterator[Predicted]:
    """Videos frame by frame, each from a fresh state, as clips of one frame with their label maps.

    Raises:
        ValueError, FileNotFoundError: unreadable image or mask, or one of another size; the file is named.
    """
    state: Any = None
    for clip in single_frame_clips(records):
        if clip["is_first"]:
            state = stream.init_state()
        file_name, labels = clip["file_names"][0], clip["labels"][0]
        image = read_image(file_name)
        if labels is not None:
            check_same_size(image, labels, file_name, clip["mask_file_name"])
        with meter.model_time():
            name = (clip["video_id"], clip["frame_ids"][0])
            label_map, state = stream.step(image, state, Hints(name=name))
        yield [clip], [[label_map]]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch a model to eval mode and give every module its own mode back, whatever happens inside.

    ``model.train()`` afterwards would not do: it wakes up modules that were frozen in eval mode.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class ProgressMeter:
    """A live bar on a terminal, a line every ten seconds in a log, and the time per frame at the end.

    Args:
        name: shown in front.
        total: frames of this process.
    """

    def __init__(self, name: str, total: int) -> None:
        self.name = name
        self.total = total
        self.frames = 0
        self.model_seconds = 0.0
        self._start = self._last_line = time.perf_counter()
        on_terminal = sys.stderr.isatty() and comm.is_main_process()
        self._bar = tqdm(total=total, desc=name, unit="frame", disable=not on_terminal)

    def __enter__(self) -> ProgressMeter:
        self._start = self._last_line = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self.frames and error[0] is None:
            seconds = time.perf_counter() - self._start
            logger.info(
                f"{self.name}: {self.frames} frames in {seconds:.1f} s, {seconds / self.frames:.4f} s/frame, of it "
                f"{self.model_seconds / self.frames:.4f} in the model"
            )

    @contextmanager
    def model_time(self) -> Iterator[None]:
        """Count the time inside as the model's. Label maps arrive on the CPU, so a GPU has finished by then."""
        start = time.perf_counter()
        yield
        self.model_seconds += time.perf_counter() - start

    def update(self, frames: int) -> None:
        """Count processed frames."""
        self.frames += frames
        self._bar.update(frames)
        now = time.perf_counter()
        if self._bar.disable and comm.is_main_process() and now - self._last_line > LOG_SECONDS:
            self._last_line = now
            rate = (now - self._start) / self.frames
            left = rate * (self.total - self.frames)
            logger.info(f"{self.name}: {self.frames}/{self.total} frames, {rate:.4f} s/frame, {left:.0f} s left")


def unwrap(model: nn.Module) -> nn.Module:
    """The segmentor inside a wrapper such as DistributedDataParallel."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) and not hasattr(model, "predict") else model


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
