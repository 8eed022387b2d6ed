"""Checks of a config before the first iteration."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from the_mask.config import allowed_values
from the_mask.config.options import value_problems
from the_mask.data import get_records, import_dataset_modules
from the_mask.data.class_names import config_classes
from the_mask.data.files import check_writable
from the_mask.engine.trackers import tracker_problems
from the_mask.inference.compose import config_problems
from the_mask.modeling.build import device_problem
from the_mask.modeling.pixel.distillation import missing_teacher
from the_mask.weights.reading import locate_weights

logger = logging.getLogger(__name__)


def validate(cfg: CfgNode, world_size: int = 1, training: bool = True, resuming: bool = False) -> None:
    """Check a config against the data sets, the number of processes and the machine.

    Args:
        cfg: the config; not changed.
        world_size: number of processes of the run.
        training: False for an evaluation, which needs neither a training set nor a batch size.
        resuming: there is a checkpoint, so ``MODEL.WEIGHTS`` will not be read.

    Raises:
        ValueError: all problems, one per line; or defects of a data set's tree, or of a module of DATASETS.IMPORT.
        FileNotFoundError: ``MODEL.WEIGHTS`` or a data set does not exist.
    """
    import_dataset_modules(cfg.DATASETS.IMPORT)
    problems = [
        *value_problems(cfg, allowed_values()),
        *_check_lists(cfg),
        *config_problems(cfg),
        *_check_device(cfg),
        *_check_report(cfg, world_size),
        *_check_datasets(cfg, training),
        *(tracker_problems(cfg.SOLVER.TRACKERS) if training else []),
        *(_check_batch(cfg, world_size) if training else []),
        *(_check_start(cfg) if training and not resuming else []),
        *(_check_teacher(cfg) if training else []),
    ]
    if problems:
        raise ValueError("the config cannot be run:\n" + "\n".join(f"  - {problem}" for problem in problems))
    if training:
        for warning in _seldom_meant(cfg):
            logger.warning(warning)
    weights = cfg.MODEL.WEIGHTS
    if weights and not resuming:
        try:
            locate_weights(weights)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"MODEL.WEIGHTS: {error}") from error
    # Also the test sets: a missing one should not be noticed by the first evaluation, hours later.
    test = () if training and cfg.TEST.EVAL_PERIOD < 0 else cfg.DATASETS.TEST
    train = cfg.DATASETS.TRAIN if training else ()
    files = {
        name: [frame["file_name"] for record in get_records(name) for frame in record["frames"]]
        for name in dict.fromkeys([*train, *test])
    }
    if training:
        for warning in _what_is_tested({name: files[name] for name in train}, {name: files[name] for name in test}):
            logger.warning(warning)


def _check_lists(cfg: CfgNode) -> Iterable[str]:
    crop = list(cfg.INPUT.CROP.SIZE)
    if len(crop) != 2 or not all(isinstance(side, int) and side > 0 for side in crop):
        yield f"INPUT.CROP.SIZE {crop}: expected [height, width], two positive whole numbers of pixels"
    if cfg.SOLVER.EMA.DECAY == 1:
        yield "SOLVER.EMA.DECAY 1 never moves the average: expected a number below 1"
    resize = cfg.INPUT.RESIZE
    if not 0 < resize.MIN_SCALE <= resize.MAX_SCALE:
        yield f"INPUT.RESIZE: expected 0 < MIN_SCALE <= MAX_SCALE, got {resize.MIN_SCALE} and {resize.MAX_SCALE}"
    if min(resize.LONG_EDGE, resize.SHORT_EDGE) < 1:
        yield f"INPUT.RESIZE: expected edges of at least 1 pixel, got {resize.LONG_EDGE} and {resize.SHORT_EDGE}"
    windows = list(cfg.TEST.VC_WINDOWS)
    if not all(isinstance(n, int) and n >= 2 for n in windows) or len(set(windows)) < len(windows):
        yield f"TEST.VC_WINDOWS {windows}: expected different whole numbers of frames, each >= 2"
    dilations = list(cfg.INPUT.CLIP.DILATIONS)
    if not all(isinstance(offset, int) for offset in dilations) or len(set(dilations)) < len(dilations):
        yield f"INPUT.CLIP.DILATIONS {dilations}: expected different whole numbers of frames"


def _seldom_meant(cfg: CfgNode) -> Iterable[str]:
    most = cfg.SOLVER.MAX_ITER
    warmup = cfg.SOLVER.WARMUP_ITERS
    if warmup >= most:
        yield f"SOLVER.WARMUP_ITERS {warmup} is not below SOLVER.MAX_ITER {most}: the rate never reaches BASE_LR"
    rounds = cfg.MODEL.THE_MASK
    if cfg.MODEL.META_ARCHITECTURE == "MaskClassifier" and rounds.ROUNDS > 1 and most <= rounds.WARMUP_ITERS:
        yield (
            f"MODEL.THE_MASK.WARMUP_ITERS {rounds.WARMUP_ITERS} is not below SOLVER.MAX_ITER {most}: all of the "
            f"training has one round of matching, not {rounds.ROUNDS}"
        )


def _what_is_tested(train: Mapping[str, Sequence[str]], test: Mapping[str, Sequence[str]]) -> Iterable[str]:
    """Warnings about test sets that are missing or share frames with training sets; by name their files."""
    if not test:
        yield "nothing is evaluated (DATASETS.TEST is empty, or TEST.EVAL_PERIOD below 0): there is no best checkpoint"
    seen = {file for files in train.values() for file in files}
    for name, files in test.items():
        shared = sum(file in seen for file in files)
        if shared:
            yield f"{name}: {shared} of {len(files)} frames are also trained on; its figures say little about others"


def _check_device(cfg: CfgNode) -> Iterable[str]:
    problem = device_problem(cfg.MODEL.DEVICE)
    if problem:
        yield problem


def _check_report(cfg: CfgNode, world_size: int) -> Iterable[str]:
    report = cfg.TEST.SAVE_REPORT
    if report and Path(report).suffix.lower() not in (".html", ".htm"):
        yield f"TEST.SAVE_REPORT {report}: expected the name of an .html file"
    elif report:
        try:
            check_writable(Path(report))
        except ValueError as error:
            yield f"TEST.SAVE_REPORT: {error}"
    if report and world_size > 1:
        yield (
            f"TEST.SAVE_REPORT {report}: a report is collected by one process, here are {world_size}; use "
            "the-mask predict and the-mask report"
        )


def _check_batch(cfg: CfgNode, world_size: int) -> Iterable[str]:
    batch, steps = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUM_STEPS
    parts = world_size * max(steps, 1)
    if batch % parts:
        fitting = max(parts, round(batch / parts) * parts)
        yield (
            f"SOLVER.IMS_PER_BATCH {batch} does not divide into {world_size} process(es) x SOLVER.ACCUM_STEPS {steps}; "
            f"{fitting} would"
        )


def _check_datasets(cfg: CfgNode, training: bool) -> Iterable[str]:
    if training and not cfg.DATASETS.TRAIN:
        yield "DATASETS.TRAIN is empty"
    if not training and not cfg.DATASETS.TEST:
        yield "DATASETS.TEST is empty, so there is nothing to evaluate"
    known = DatasetCatalog.list()
    classes, ignore = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    names: Sequence[str] = [*(cfg.DATASETS.TRAIN if training else ()), *cfg.DATASETS.TEST]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3) or sorted(known)
            yield (
                f"unknown dataset {name!r} (DATASETS); known are {', '.join(close)}; DATASETS.IMPORT names modules "
                "that register others"
            )
            continue
        metadata = MetadataCatalog.get(name)
        count = len(metadata.get("stuff_classes", ()))
        if count and count != classes:
            yield f"{name} has {count} classes: set MODEL.SEM_SEG_HEAD.NUM_CLASSES {count} (it is {classes})"
        label = metadata.get("ignore_label", ignore)
        if label != ignore:
            yield f"{name} marks void pixels by {label}: set MODEL.SEM_SEG_HEAD.IGNORE_VALUE {label} (it is {ignore})"
    try:
        config_classes(cfg, names)
    except ValueError as error:
        yield str(error)
    if 0 <= ignore < classes:
        yield f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE {ignore} is also the id of a class (NUM_CLASSES {classes})"


def _check_start(cfg: CfgNode) -> Iterable[str]:
    if cfg.MODEL.THE_MASK.INIT_FROM_STAGE1 and not cfg.MODEL.WEIGHTS:
        yield "MODEL.THE_MASK.INIT_FROM_STAGE1 needs the one-frame checkpoint in MODEL.WEIGHTS, which is empty"


def _check_teacher(cfg: CfgNode) -> Iterable[str]:
    if cfg.MODEL.META_ARCHITECTURE == "DistilledSegmentor":
        options = cfg.MODEL.DISTILLATION
        yield from missing_teacher(options)
        try:
            if options.TEACHER_WEIGHTS:
                locate_weights(options.TEACHER_WEIGHTS)
        except (FileNotFoundError, ValueError) as error:
            yield f"MODEL.DISTILLATION.TEACHER_WEIGHTS: {error}"
