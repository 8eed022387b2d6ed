"""The training loop: trains a config and writes checkpoints, curves and evaluation results."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, TensorboardXWriter
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from the_mask.data import build_train_loader
from the_mask.data.class_names import config_classes
from the_mask.data.clips import as_clips
from the_mask.data.files import remove_leftovers
from the_mask.engine import resume
from the_mask.engine.batch_norm import name_single_values
from the_mask.engine.buffers import BufferCopies
from the_mask.engine.distributed import sum_over_ranks, wrap_distributed, write_on_main
from the_mask.engine.ema import ExponentialMovingAverage
from the_mask.engine.hooks import CheckpointHook, EvalHook, ProgressHook, StopHook
from the_mask.engine.logs import without_traceback
from the_mask.engine.matching_stats import MatchingHook
from the_mask.engine.optimizer import build_optimizer, clip_gradients, set_learning_rate
from the_mask.engine.output_lock import claimed
from the_mask.engine.resume import load as load_training
from the_mask.engine.rng import preserved_rng, rng_state, seed_everything
from the_mask.engine.schedule import WarmupPoly
from the_mask.engine.setup import with_seed
from the_mask.engine.signals import StopRequest, TrainingInterrupted
from the_mask.engine.trackers import open_trackers
from the_mask.engine.writers import LogWriter, MetricsWriter, prepare_metrics_file
from the_mask.evaluation import evaluate_dataset
from the_mask.modeling.build import build_segmentor
from the_mask.weights.checkpoint import BEST, FINAL, CheckpointFolder, CheckpointWriteError
from the_mask.weights.class_sets import ClassSets
from the_mask.weights.loading import LoadReport, load_weights
from the_mask.weights.sharding import gathered_copy, is_sharded, shard_model, wants_sharding, write_parts

logger = logging.getLogger(__name__)

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer(TrainerBase):
    """Trains the model of a config.

    One iteration has ``SOLVER.ACCUM_STEPS`` micro-batches, one optimiser step and one step of the schedule. Losses are
    averaged over micro-batches and processes. So a term that is normalised per micro-batch (the class-weighted
    cross-entropy) is a mean of means; with equal normalisers it equals that of one large batch.

    Attributes:
        model: the unwrapped model, also with several processes.
        completed: number of finished iterations, including those before a resume.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: a full config, see :func:`the_mask.config.load_config`.

        Raises:
            ValueError: training and test sets have different classes, or another order; see also
                :func:`the_mask.engine.validate`, which checks more.
        """
        super().__init__()
        config_classes(cfg)
        self.cfg = with_seed(cfg)
        self.seed_was_drawn = cfg.SEED < 0
        self.device = torch.device(cfg.MODEL.DEVICE)
        # Different per rank, so that dropout differs; the weights are synchronised with the first rank's.
        seed_everything(self.cfg.SEED + comm.get_rank())
        self.model = self.build_model(self.cfg)
        if wants_sharding(cfg):
            shard_model(self.model, self.device)
        self.optimizer = build_optimizer(cfg, self.model)
        self.schedule = WarmupPoly.from_config(cfg)
        precision = cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else None
        self.autocast_dtype = PRECISIONS[precision] if precision else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.ema = ExponentialMovingAverage(self.model, cfg.SOLVER.EMA.DECAY) if cfg.SOLVER.EMA.ENABLED else None
        self.checkpoints = CheckpointFolder(cfg.OUTPUT_DIR, cfg.SOLVER.CHECKPOINT_KEEP)
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.completed = 0
        self.run_id = uuid.uuid4().hex
        self.results: dict[str, Any] = {}
        self.stop = StopRequest()
        self.stop_signal = 0
        self._parallel: nn.Module | None = None
        self._loader: Iterable[Sequence[Any]] | None = None
        self._batches: Iterator[Sequence[Any]] | None = None
        self._resumed_rng: dict[str, Any] | None = None
        self._resumed_scalars: dict[str, Any] = {}
        # First iteration that is written to the curves (again, if it is there); None: the first of the training.
        self.metrics_from: int | None = None
        # Generator states before the current step (None between steps), and copies of the buffers.
        self._rng_before_step: dict[str, Any] | None = None
        self._buffers = BufferCopies()
        self._updating = False
        self._saved = 0
        self.register_hooks(self.build_hooks())

    # Methods that subclasses may override.

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model on its device."""
        model = build_segmentor(cfg)
        count = sum(parameter.numel() for parameter in model.parameters())
        logger.info("%s: %.2f M parameters", type(model).__name__, count / 1e6)
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int) -> Iterable[Sequence[Any]]:
        """Endless micro-batches, starting with those of iteration ``start_iter``."""
        return build_train_loader(cfg, start_iter=start_iter)

    @classmethod
    def evaluate_model(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Results on ``DATASETS.TEST``; for several data sets, by name."""
        results = {name: evaluate_dataset(cfg, model, name) for name in cfg.DATASETS.TEST}
        return next(iter(results.values())) if len(results) == 1 else results

    def build_hooks(self) -> list[HookBase | None]:
        """Hooks in the order in which they run after a step."""
        solver = self.cfg.SOLVER
        hooks: list[HookBase | None] = [
            MatchingHook(solver.CHECKPOINT_PERIOD),
            CheckpointHook(solver.CHECKPOINT_PERIOD),
            StopHook(),
            EvalHook(self.cfg.TEST.EVAL_PERIOD if self.cfg.DATASETS.TEST else -1, solver.CHECKPOINT_BEST),
        ]
        if comm.is_main_process():
            hooks.append(ProgressHook(self.build_writers, solver.LOG_PERIOD))
        return hooks

    def build_writers(self) -> list[EventWriter]:
        """Writers: log lines, ``metrics.json`` (one JSON object per line), TensorBoard, and ``SOLVER.TRACKERS``."""
        folder = Path(self.cfg.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        metrics = MetricsWriter(prepare_metrics_file(folder, self.start_iter, self.metrics_from))
        curves = TensorboardXWriter(str(folder))
        # For a resumed run, the results of earlier iterations are in its files already.
        curves._last_write = metrics.last
        trackers = open_trackers(self.cfg.SOLVER.TRACKERS, folder, self.cfg, self.start_iter > 0, metrics.last)
        return [LogWriter(self.max_iter, self.start_iter), metrics, curves, *trackers]

    # Starting points.

    def load_weights(self, path: str | Path, trust_pickle: bool = False) -> LoadReport:
        """Start from the weights of a file; see :func:`the_mask.weights.load_weights`.

        Raises:
            ValueError: also if the file has other classes, and the class layers that would start anew are frozen.
        """
        stage1 = self.cfg.MODEL.THE_MASK.INIT_FROM_STAGE1
        classes = ClassSets.from_config(self.cfg)
        report = load_weights(self.model, path, trust_pickle=trust_pickle, stage1=stage1, classes=classes)
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        lost = sorted(frozen & {*(name for name, _, _ in report.dropped), *report.by_name})
        if lost:
            raise ValueError(
                f"{path} was trained for other classes, and layers that would start anew are frozen in this training, "
                f"so they would never learn: {', '.join(lost[:4])}{', ...' if len(lost) > 4 else ''}. Train the frozen "
                f"part (of keyframe models, MODEL.META_ARCHITECTURE {self.cfg.MODEL.KEYFRAME.SEGMENTOR}) on these "
                f"classes first, and start from its checkpoint\n{report}"
            )
        if self.ema is not None:
            self.ema = ExponentialMovingAverage(self.model, self.cfg.SOLVER.EMA.DECAY)
        return report

    def resume_or_load(self, resume: bool = True, trust_pickle: bool = False) -> None:
        """Continue from the last checkpoint of ``OUTPUT_DIR``, or else start from ``MODEL.WEIGHTS`` if it is set.

        Raises:
            FileNotFoundError, ValueError: no such file, or a damaged or wrong one; the message says what to use
                instead.
        """
        last = self.checkpoints.last()
        if resume and last is not None:
            load_training(self, last)
            return
        if resume:
            logger.warning("no checkpoint in %s to resume from: starting at iteration 0", self.checkpoints.folder)
        elif last is not None:
            logger.warning("%s holds an earlier run, whose files this one replaces; --resume would continue it", last)
        if self.cfg.MODEL.WEIGHTS:
            self.load_weights(self.cfg.MODEL.WEIGHTS, trust_pickle)

    # Training.

    def train(self) -> dict[str, Any]:  # type: ignore[override]  # the range is the config's, as in DefaultTrainer
        """Train to ``SOLVER.MAX_ITER``.

        Returns:
            Results of the last evaluation (empty if there was none).

        Raises:
            TrainingInterrupted: Ctrl-C or SIGTERM, after a checkpoint was written.
            FloatingPointError: a loss or the gradient is not finite.
            CheckpointWriteError: a checkpoint could not be written.
            OutputInUseError: another training writes to ``OUTPUT_DIR``.
        """
        with claimed(self.checkpoints.folder):
            if comm.is_main_process():
                self.checkpoints.ensure()
                remove_leftovers(self.checkpoints.folder)
            self.model.train()
            name_single_values(self.cfg, self.model)
            with self.stop.installed(), without_traceback(OSError):
                try:
                    if self.completed >= self.max_iter:
                        logger.info(
                            "nothing left to train: %d of %d iterations are done", self.completed, self.max_iter
                        )
                    else:
                        sharded = is_sharded(self.model)
                        self._parallel = self.model if sharded else wrap_distributed(self.model, self.device)
                        self._open_loader()
                    if self._resumed_rng is not None:
                        resume.restore_rng(self._resumed_rng, self.cfg.SEED)
                        self._resumed_rng = None
                    # Without iterations, run what hooks still have to do: an evaluation.
                    super().train(self.completed, max(self.completed, self.max_iter))
                except BaseException as error:
                    self._rescue(error)
                    raise
                finally:
                    self._batches = self._loader = None
        return self.results

    def before_train(self) -> None:
        """Restore the scalars of a resumed run, then call the hooks."""
        resume.restore_scalars(self.storage, self._resumed_scalars, self.start_iter)
        self._resumed_scalars = {}
        super().before_train()

    def _open_loader(self) -> None:
        with preserved_rng():
            self._loader = self.build_train_loader(self.cfg, self.completed)
            self._batches = iter(self._loader)

    def run_step(self) -> None:
        """One iteration: forward and backward of the micro-batches, check for NaN, one optimiser step."""
        started = time.perf_counter()
        self._buffers.take(self.model)
        self._rng_before_step = rng_state()
        lr = self.schedule(self.iter)
        set_learning_rate(self.optimizer, lr, self.schedule.backbone(self.iter))
        set_iteration = getattr(self.model, "set_iteration", None)
        if set_iteration is not None:
            set_iteration(self.iter)
        self.optimizer.zero_grad(set_to_none=True)
        losses, files, data_time = self._accumulate()
        norm = self._clip()
        self._guard(losses, norm, files, lr)
        self._updating = True
        self.scaler.step(self.optimizer)
        self.scaler.update()
        after_step = getattr(self.model, "after_step", None)
        if after_step is not None:
            after_step()
        if self.ema is not None:
            self.ema.update(self.model)
        self.completed = self.iter + 1
        self._updating = False
        self._rng_before_step = None
        self._record(losses, norm, lr, data_time, time.perf_counter() - started)

    def _accumulate(self) -> tuple[dict[str, float], list[str], float]:
        """Compute one iteration's gradients; returns mean losses, files, and seconds spent waiting for data."""
        assert self._parallel is not None
        assert self._batches is not None
        steps = self.cfg.SOLVER.ACCUM_STEPS
        sums: dict[str, Tensor] = {}
        files: list[str] = []
        waited = 0.0
        for step in range(steps):
            before = time.perf_counter()
            # Data loading does not change the generators, so it does not matter where a resumed loader starts.
            with preserved_rng():
                clips = as_clips(next(self._batches))
            waited += time.perf_counter() - before
            files += [file for clip in clips for file in clip.file_names]
            with self._without_sync(step + 1 < steps):
                with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                    losses = self._parallel(clips)
                total = torch.stack([value.float() for value in losses.values()]).sum() / steps
                self.scaler.scale(total).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float() / steps
        self.after_backward()
        return self._reduce(sums), files, waited

    def _without_sync(self, last_is_to_come: bool) -> AbstractContextManager[Any]:
        """Exchange gradients between processes only after the last micro-batch."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(not last_is_to_come)
            return nullcontext()
        if last_is_to_come and self._parallel is not self.model:
            return self._parallel.no_sync()  # type: ignore[union-attr, operator]
        return nullcontext()

    def _reduce(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Average losses over ranks; the same message tells whether any rank was asked to stop."""
        names = sorted(losses)
        values = torch.stack([losses[name] for name in names] + [losses[names[0]].new_tensor(self.stop.signum)])
        reduced = sum_over_ranks(values).tolist()
        # The sum of the ranks' signal numbers; other ranks only check that it is not zero.
        if reduced[-1]:
            self.stop_signal = self.stop.signum or int(max(comm.all_gather(self.stop.signum)))
        world = comm.get_world_size()
        return {name: value / world for name, value in zip(names, reduced[:-1], strict=True)}

    def _clip(self) -> float | None:
        clip = self.cfg.SOLVER.CLIP_GRADIENTS
        if not clip.ENABLED:
            return None
        self.scaler.unscale_(self.optimizer)
        parameters = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        norm = clip_gradients(parameters, clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE)
        return None if norm is None else float(norm)

    def _guard(self, losses: dict[str, float], norm: float | None, files: list[str], lr: float) -> None:
        """Stop before a NaN reaches the weights.

        Losses were averaged over the ranks, so all ranks decide the same.
        """
        # With fp16, the scaler handles an overflowing gradient: it skips the step and lowers the scale.
        gradient_fails = norm is not None and not math.isfinite(norm) and not self.scaler.is_enabled()
        bad = {name: value for name, value in losses.items() if not math.isfinite(value)}
        if not bad and not gradient_fails:
            return
        what = ", ".join(f"{name} = {value}" for name, value in bad.items()) or f"gradient norm = {norm}"
        shown = ", ".join(f"{name} = {value:.6g}" for name, value in losses.items())
        batches = comm.all_gather(files)
        listing = "\n".join(
            f"  rank {rank}: {', '.join(names) or '(no file names)'}" for rank, names in enumerate(batches)
        )
        raise FloatingPointError(
            f"not finite at iteration {self.iter}, before the optimiser step: {what}\nall losses: {shown}\n"
            f"learning rate {lr:.3g}; files of the batch:\n{listing}\n"
            "lower SOLVER.BASE_LR, use bf16 instead of fp16, or look at these files"
        )

    def _record(
        self, losses: dict[str, float], norm: float | None, lr: float, data_time: float, seconds: float
    ) -> None:
        scalars = {**losses, "total_loss": sum(losses.values()), "data_time": data_time, "time": seconds}
        for name, value in scalars.items():
            self.storage.put_scalar(name, value)
        self.storage.put_scalar("lr", lr, smoothing_hint=False)
        if norm is not None:
            self.storage.put_scalar("grad_norm", norm)
        if self.scaler.is_enabled():
            self.storage.put_scalar("amp_scale", self.scaler.get_scale(), smoothing_hint=False)
        stats = getattr(getattr(self.model, "criterion", None), "last_stats", None) or {}
        for name, value in stats.items():
            if isinstance(value, (int, float)):
                self.storage.put_scalar(f"criterion/{name}", value)

    # Evaluation.

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the current (with EMA: the averaged) weights, without affecting the training."""
        training = self.model.training
        averaged = self.ema.applied_to(self.model) if self.ema is not None else nullcontext()
        # If one rank left immediately, the others would wait for ever.
        alone = comm.get_world_size() == 1
        with self.stop.immediate(alone), preserved_rng(), averaged:
            try:
                model = self.model
                if is_sharded(model):
                    model = gathered_copy(model, lambda: self.build_model(self.cfg))
                self.results = self.evaluate_model(self.cfg, model.eval()) or {}
            finally:
                self.model.train(training)
        return self.results

    # Checkpoints.

    def save_numbered(self) -> None:
        """Write ``model_<iteration>.pth``, unless it is on disk already."""
        name = self.checkpoints.numbered_name(self.completed - 1)
        self._save(name, lambda state: self.checkpoints.save_numbered(self.completed - 1, state))

    def save_final(self) -> None:
        """Write ``model_final.pth``."""
        self._save(FINAL, self.checkpoints.save_final)

    def _save(self, name: str, write: Any, rng: list[dict[str, Any]] | None = None) -> None:
        if self._saved == self.completed:
            return
        state = write_parts(self.checkpoints.folder / name, resume.training_state(self, rng))
        write_on_main(lambda: write(state))
        self._saved = self.completed
        logger.info("checkpoint of iteration %d written to %s", self.completed, self.checkpoints.folder)

    def save_best_if(self, is_best: bool, metrics: dict[str, float]) -> None:
        """Write ``model_best.pth`` if the first process decides so."""
        state = resume.weights_state(self)
        is_best = comm.all_gather(is_best)[0]
        if is_best:
            state = write_parts(self.checkpoints.folder / BEST, state)
        write_on_main(lambda: self.checkpoints.save_best({**state, "metrics": metrics}) if is_best else None)

    def _rescue(self, error: BaseException) -> None:
        """Write a checkpoint of the last finished iteration when a single process fails or must stop immediately.

        Not possible with several processes: the others may be waiting inside a collective operation.
        """
        unsaved = self.completed > max(self._saved, self.start_iter)
        if comm.get_world_size() > 1 or self._updating or not unsaved or isinstance(error, CheckpointWriteError):
            return
        rng = None
        if self._rng_before_step is not None:
            # The failed step has drawn random numbers and changed the statistics of batch norms.
            rng = [self._rng_before_step]
            self._buffers.restore(self.model)
        if not all(torch.isfinite(value).all() for value in self.model.state_dict().values()):
            return
        try:
            name = self.checkpoints.numbered_name(self.completed - 1)
            self._save(name, lambda state: self.checkpoints.save_numbered(self.completed - 1, state), rng)
        except CheckpointWriteError as problem:
            logger.error("the checkpoint that should have been left is missing: %s", problem)
        if self.stop.signum and not isinstance(error, TrainingInterrupted):
            # For instance a data worker killed by the same Ctrl-C.
            raise TrainingInterrupted(self.stop.signum) from error
