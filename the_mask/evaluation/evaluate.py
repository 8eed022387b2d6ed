"""Runs a model on a test set and scores it."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from the_mask.data import get_records
from the_mask.data.class_names import check_classes
from the_mask.data.label_maps import raw_values_of_classes
from the_mask.data.video_tree import Record
from the_mask.evaluation.claims import alone_in, disclaim
from the_mask.evaluation.evaluator import VideoSemSegEvaluator
from the_mask.evaluation.html import ReportSink, write_report
from the_mask.evaluation.keyframe import evaluate_keyframes
from the_mask.evaluation.loop import predict_videos, unwrap
from the_mask.evaluation.temporal_consistency import raft_flow
from the_mask.inference.sinks import LabelFolder, Sink
from the_mask.modeling.freezing import evaluation_mode

logger = logging.getLogger(__name__)


def evaluate_dataset(cfg: CfgNode, model: nn.Module, dataset_name: str) -> OrderedDict[str, dict[str, float]]:
    """Predict every frame of a test set and score it; a collective call if there are several processes.

    Args:
        cfg, model: see :func:`predict_videos`; predictions and scores are also written if ``TEST.SAVE_*`` is set.
        dataset_name: registered data set.

    Returns:
        As :meth:`VideoSemSegEvaluator.evaluate`, on every process; with ``TEST.KEYFRAME_DISTANCES`` also ``keyframe``,
        see :func:`the_mask.evaluation.keyframe.evaluate_keyframes`.

    Raises:
        ValueError, FileNotFoundError: unknown data set, classes that do not fit the model, or bad files (named).
    """
    check_classes(cfg, [dataset_name])
    with alone_in(*(Path(folder) if folder else None for folder in (cfg.TEST.SAVE_PREDICTIONS, cfg.TEST.SAVE_SCORES))):
        return _evaluate(cfg, model, dataset_name)


def _evaluate(cfg: CfgNode, model: nn.Module, dataset_name: str) -> OrderedDict[str, dict[str, float]]:
    records = get_records(dataset_name)
    plain = unwrap(model)
    evaluator = build_evaluator(cfg, dataset_name, records, _device(plain))
    report = _report(cfg, dataset_name)
    sinks = [evaluator, *([report] if report else []), *_writers(cfg, dataset_name)]
    predict_videos(cfg, plain, dataset_name, records, sinks)
    by_distance = None
    if cfg.TEST.KEYFRAME_DISTANCES:
        with evaluation_mode(plain):
            by_distance = evaluate_keyframes(cfg, plain, dataset_name)
    if getattr(plain, "propagates", False):
        # Averages over whole videos are not causal, so results have to name the mode.
        logger.info("%s: class logits of the queries: %s (TEST.CLASS_LOGITS)", dataset_name, cfg.TEST.CLASS_LOGITS)
    results = evaluator.evaluate(expected_frames=sum(len(record["frames"]) for record in records))
    if by_distance is not None:
        results["keyframe"] = by_distance
    if report is not None:
        file = Path(cfg.TEST.SAVE_REPORT)
        if len(cfg.DATASETS.TEST) > 1:
            file = file.with_stem(f"{file.stem}_{dataset_name}")
        logger.info("report: %s", write_report(file, [report.report(results["sem_seg"])]))
    return results


def build_evaluator(
    cfg: CfgNode, dataset_name: str, records: Sequence[Record], device: torch.device | str = "cpu"
) -> VideoSemSegEvaluator:
    """The evaluator configured by ``cfg.TEST``; the optical flow of TC runs on ``device``."""
    weights, tc_videos = cfg.TEST.TC_FLOW_WEIGHTS, cfg.TEST.TC_MAX_VIDEOS
    return VideoSemSegEvaluator(
        dataset_name,
        windows=cfg.TEST.VC_WINDOWS,
        # A block of the tiling, whose clips may be finished in one batch.
        max_pending=cfg.TEST.CLIP_LENGTH * cfg.TEST.CLIP_STRIDE,
        flow=raft_flow(weights, device) if weights else None,
        tc_videos={record["video_id"] for record in records[:tc_videos]} if tc_videos else None,
        boundary_ratio=cfg.TEST.BOUNDARY_RATIO,
    )


def _report(cfg: CfgNode, dataset_name: str) -> ReportSink | None:
    """The sink of ``TEST.SAVE_REPORT``."""
    if not cfg.TEST.SAVE_REPORT:
        return None
    return ReportSink(dataset_name, Path(cfg.OUTPUT_DIR).name or dataset_name)


def _writers(cfg: CfgNode, dataset_name: str) -> list[Sink]:
    """The sink of ``TEST.SAVE_PREDICTIONS``. Its folder and that of ``TEST.SAVE_SCORES`` cannot be resumed."""
    if cfg.TEST.SAVE_SCORES:
        disclaim(cfg.TEST.SAVE_SCORES)
    if not cfg.TEST.SAVE_PREDICTIONS:
        return []
    folder = Path(cfg.TEST.SAVE_PREDICTIONS)
    if len(cfg.DATASETS.TEST) > 1:
        folder = folder / dataset_name
    disclaim(folder)
    metadata = MetadataCatalog.get(dataset_name)
    return [LabelFolder(folder, raw_values_of_classes(metadata.label_table, len(metadata.stuff_classes)))]


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
