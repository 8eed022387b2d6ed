"""Training and evaluation runs, as started by the command line in every process."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from the_mask.data import get_records
from the_mask.data.class_names import classes_dataset
from the_mask.data.io import read_size
from the_mask.engine.launch import USER_ERRORS, count_processes, launch, plain_message
from the_mask.engine.output_lock import claimed
from the_mask.engine.setup import setup
from the_mask.engine.signals import TrainingInterrupted
from the_mask.engine.trainer import Trainer
from the_mask.engine.validate import validate
from the_mask.inference.runtimes import prepare_stream
from the_mask.inference.stream import StreamingSegmentor
from the_mask.weights.checkpoint import CheckpointFolder
from the_mask.weights.start import start_config
from the_mask.weights.trained import trained

logger = logging.getLogger(__name__)


@dataclass
class RunOptions:
    """Options of a run.

    Attributes:
        config_file: YAML file; or "" with ``model``.
        overrides: flat list ``[KEY, VALUE, ...]``.
        resume: continue from the last checkpoint of ``OUTPUT_DIR``.
        eval_only: evaluate ``MODEL.WEIGHTS`` (with ``resume``: the last checkpoint) on ``DATASETS.TEST``.
        trust_pickle: allow weights files that can execute code.
        allow_unsafe_yaml: allow YAML that can execute code.
        allow_remote_config: let the config and its ``_BASE_`` be URLs.
        runtime: what runs the networks of an evaluation: ``backend``, ``precision`` and ``calibrate`` of
            :func:`the_mask.inference.runtimes.prepare_stream`.
        model, data: see :func:`the_mask.weights.start.start_config`.
    """

    config_file: str | Path = ""
    overrides: list[str] = field(default_factory=list)
    resume: bool = False
    eval_only: bool = False
    trust_pickle: bool = False
    allow_unsafe_yaml: bool = False
    allow_remote_config: bool = False
    runtime: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    data: str = ""

    def load(self) -> CfgNode:
        """The frozen config."""
        cfg = start_config(
            self.config_file,
            self.overrides,
            model=self.model,
            data=self.data,
            allow_unsafe=self.allow_unsafe_yaml,
            allow_remote=self.allow_remote_config,
        )
        cfg.freeze()
        return cfg


def check(options: RunOptions, world_size: int) -> CfgNode:
    """Load the config and check it and the options before anything starts.

    Raises:
        ValueError, FileNotFoundError: see :func:`the_mask.engine.validate`; or an evaluation without weights.
    """
    cfg = options.load()
    resuming = options.resume and CheckpointFolder(cfg.OUTPUT_DIR).last() is not None
    validate(cfg, world_size, training=not options.eval_only, resuming=resuming)
    if options.eval_only:
        _weights_to_evaluate(cfg, options.resume)
    return cfg


def run_processes(
    options: RunOptions,
    *,
    num_gpus: int = 0,
    num_processes: int = 0,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
) -> None:
    """:func:`check` once, then :func:`run_training` in the processes that :func:`the_mask.engine.launch` starts.

    Args:
        options: options of the run.
        num_gpus, num_processes, num_machines, machine_rank, dist_url: see :func:`the_mask.engine.launch`.
    """
    cfg = check(options, count_processes(num_gpus, num_processes, num_machines, dist_url))
    device = cfg.MODEL.DEVICE
    if num_gpus > 1 and device == "cpu":
        raise ValueError(f"--num-gpus {num_gpus} with MODEL.DEVICE cpu: use --num-processes for CPU processes")
    launch(
        run_training,
        (options,),
        num_gpus=num_gpus,
        num_processes=num_processes,
        num_machines=num_machines,
        machine_rank=machine_rank,
        dist_url=dist_url,
        device=device,
    )


def run_training(options: RunOptions) -> dict[str, Any]:
    """Train or evaluate in this process, which may be one of several.

    Returns:
        Evaluation results.

    Raises:
        ValueError, FileNotFoundError: bad input, found before the first iteration where possible.
        FloatingPointError, CheckpointWriteError, TrainingInterrupted: see :meth:`Trainer.train`.
    """
    cfg = check(options, comm.get_world_size())
    if options.eval_only:
        setup(cfg)
        return evaluate_only(cfg, options.resume, options.trust_pickle, options.runtime)
    with claimed(cfg.OUTPUT_DIR):
        setup(cfg)
        trainer = Trainer(cfg)
        trainer.resume_or_load(options.resume, options.trust_pickle)
        return trainer.train()


def _first_size(names: Sequence[str]) -> tuple[int, int] | None:
    """(height, width) of the first frame of some data sets."""
    for name in names:
        for record in get_records(name):
            return read_size(record["frames"][0]["file_name"])
    return None


def evaluate_only(
    cfg: CfgNode, resume: bool = False, trust_pickle: bool = False, runtime: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Evaluate ``MODEL.WEIGHTS`` or, with ``resume``, the last checkpoint of ``OUTPUT_DIR``.

    Raises:
        ValueError: no weights are given, or they do not fill the whole model.
    """
    path = _weights_to_evaluate(cfg, resume)
    model = trained(cfg, weights=path, trust_pickle=trust_pickle)
    options = dict(runtime or {})
    if options.get("calibrate"):  # only then: the list of a large data set takes seconds
        options["size"] = _first_size(cfg.DATASETS.TEST)
    report = prepare_stream(StreamingSegmentor(cfg, model), **options)
    results = Trainer.evaluate_model(cfg, model)
    if report is not None:
        name = classes_dataset(cfg, cfg.DATASETS.TEST)
        report.classes = MetadataCatalog.get(name).stuff_classes if name else []
        logger.info("%s", report)
    return results


def _weights_to_evaluate(cfg: CfgNode, resume: bool) -> str | Path:
    last = CheckpointFolder(cfg.OUTPUT_DIR).last() if resume else None
    if last is None and not cfg.MODEL.WEIGHTS:
        where = f", and {cfg.OUTPUT_DIR} has no checkpoint" if resume else ""
        raise ValueError(f"an evaluation needs weights: MODEL.WEIGHTS is empty{where}")
    return last or str(cfg.MODEL.WEIGHTS)


def exit_code(command: Callable[[], object], also: tuple[type[Exception], ...] = ()) -> int:
    """Run a command and return its exit code: 0, 1 with a plain message, or 130 after Ctrl-C.

    Errors that a user can fix, and those in ``also``, are printed without a traceback; all others are defects and
    propagate.
    """
    mendable: tuple[type[Exception], ...] = (*USER_ERRORS, *also)
    try:
        command()
    except TrainingInterrupted as interruption:
        print(f"{interruption}; the checkpoint is in OUTPUT_DIR, continue with --resume", file=sys.stderr)
        return interruption.exit_code
    except KeyboardInterrupt:
        print("interrupted before there was anything to save", file=sys.stderr)
        return 130
    except ProcessExitedException as error:
        # The child process has printed the reason.
        return error.exit_code if error.exit_code and error.exit_code > 0 else 1
    except mendable as error:
        print(f"error: {plain_message(error)}", file=sys.stderr)
        return 1
    return 0
