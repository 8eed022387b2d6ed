"""Hooks around training iterations: checkpoints, stopping, evaluation, progress."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from the_mask.data.schema import Each, Maybe, check_schema
from the_mask.engine.signals import TrainingInterrupted
from the_mask.engine.writers import ProgressBar, has_screen, recorded_names

if TYPE_CHECKING:
    from the_mask.engine.trainer import Trainer

logger = logging.getLogger(__name__)
# Schema of what EvalHook leaves in a checkpoint.
EVAL_STATE: dict[str, Any] = {
    "best": Maybe((float, int)),
    "best_iteration": Maybe(int),
    "metric": str,
    "names": Maybe(Each(list, str)),
}


class CheckpointHook(HookBase):
    """Writes a numbered checkpoint every ``period`` iterations, and the final one at the end."""

    trainer: Trainer

    def __init__(self, period: int) -> None:
        """
        Args:
            period: iterations between checkpoints; 0 or less writes only the final one.
        """
        self.period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter:
            self.trainer.save_final()
        elif self.period > 0 and done % self.period == 0:
            self.trainer.save_numbered()


class StopHook(HookBase):
    """Writes a checkpoint and ends the training after a stop signal (on any rank)."""

    trainer: Trainer

    def after_step(self) -> None:
        signum = self.trainer.stop_signal
        if not signum:
            return
        self.trainer.save_numbered()
        raise TrainingInterrupted(signum)


def flatten_results(results: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten nested evaluation results to ``{"sem_seg/mIoU": 41.2}``; values that are not numbers are left out."""
    flat: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, dict):
            flat.update(flatten_results(value, f"{prefix}{name}/"))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[prefix + name] = float(value)
    return flat


def find_metric(flat: dict[str, float], metric: str) -> tuple[str, float] | None:
    """Find a metric by its full name, or by the part after a slash; returns full name and value of the first match.

    Class names may contain slashes: "IoU-road/lane".
    """
    for name, value in flat.items():
        if name == metric or name.endswith(f"/{metric}"):
            return name, value
    return None


class EvalHook(HookBase):
    """Evaluates every ``period`` iterations and at the end, and saves the best weights.

    Runs after :class:`CheckpointHook`, so that no training is lost if an evaluation is killed; it is repeated when the
    run is resumed.
    """

    trainer: Trainer

    def __init__(self, period: int, metric: str) -> None:
        """
        Args:
            period: iterations between evaluations; 0 evaluates only at the end, as in Detectron2, less than 0 never.
            metric: metric for the best checkpoint (larger is better); ``""`` saves none.
        """
        self.period = period
        self.metric = metric
        self.best: float | None = None
        self.best_iteration: int | None = None
        # Names of the last evaluation's results.
        self._names: list[str] = []
        self._warned = False

    def before_train(self) -> None:
        done = self.trainer.start_iter
        if not done or not self._is_due(done):
            return
        recorded = recorded_names(self.trainer.checkpoints.folder, done - 1)
        missing = done >= self.trainer.max_iter or not recorded.intersection(self._names)
        if comm.all_gather(missing)[0]:
            logger.info("evaluating iteration %d, which the earlier run did not finish", done)
            self.trainer.storage.iter = done - 1
            self.run(done)
            self.trainer.storage.iter = done
            self.trainer.metrics_from = done - 1

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._is_due(done):
            self.run(done)

    def _is_due(self, done: int) -> bool:
        if self.period < 0:
            return False
        return done >= self.trainer.max_iter or (self.period > 0 and done % self.period == 0)

    def run(self, done: int) -> None:
        """Evaluate now, store the results, and save the weights if they are the best so far.

        Args:
            done: number of finished iterations.
        """
        flat = flatten_results(self.trainer.evaluate())
        self._names = sorted(flat)
        for name, value in flat.items():
            # NaN means that a figure was not computed, and is not valid JSON.
            if math.isfinite(value):
                self.trainer.storage.put_scalar(name, value, smoothing_hint=False)
        self.trainer.save_best_if(self._is_new_best(flat, done), flat)

    def _is_new_best(self, flat: dict[str, float], done: int) -> bool:
        if not self.metric or not flat:
            # Only the first rank has results.
            return False
        found = find_metric(flat, self.metric)
        if found is None:
            if not self._warned:
                logger.warning(
                    "SOLVER.CHECKPOINT_BEST %s is not among the results (%s): no best checkpoint is kept",
                    self.metric,
                    ", ".join(flat),
                )
                self._warned = True
            return False
        name, value = found
        if not math.isfinite(value) or (self.best is not None and value <= self.best):
            logger.info("%s %.4f; the best so far is %s at iteration %s", name, value, self.best, self.best_iteration)
            return False
        self.best, self.best_iteration = value, done
        logger.info("%s %.4f is the best so far", name, value)
        return True

    def take_best(self, metrics: dict[str, float], iteration: int) -> None:
        """Take over an earlier best checkpoint of the same run, with its results."""
        found = find_metric(metrics, self.metric)
        if found is not None and (self.best is None or found[1] > self.best):
            self.best, self.best_iteration = found[1], iteration

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "best_iteration": self.best_iteration,
            "metric": self.metric,
            "names": self._names,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_schema(state, EVAL_STATE, "the state of evaluations is damaged")
        self._names = list(state.get("names") or ())
        if state["metric"] == self.metric:
            self.best, self.best_iteration = state["best"], state["best_iteration"]


class ProgressHook(HookBase):
    """Shows a progress bar on a terminal, and calls writers every ``period`` iterations and at the end."""

    trainer: Trainer

    def __init__(self, build_writers: Callable[[], list[EventWriter]], period: int) -> None:
        """
        Args:
            build_writers: called when training starts, so that an evaluation creates no files.
            period: iterations between writes.
        """
        self._build_writers = build_writers
        self._writers: list[EventWriter] = []
        self._bar: ProgressBar | None = None
        self.period = max(1, period)

    def before_train(self) -> None:
        self._writers = self._build_writers()
        if has_screen(sys.stderr):
            self._bar = ProgressBar(self.trainer.start_iter, self.trainer.max_iter)
        # Results that a repeated evaluation has added to the last iteration of the earlier run.
        if self.trainer.start_iter and self._is_due(self.trainer.start_iter):
            self._write()

    def after_step(self) -> None:
        if self._bar is not None:
            latest = self.trainer.storage.latest()
            self._bar.step(*(latest[name][0] if name in latest else None for name in ("total_loss", "lr")))
        if self._is_due(self.trainer.iter + 1):
            self._write()

    def _is_due(self, done: int) -> bool:
        return done % self.period == 0 or done >= self.trainer.max_iter

    def _write(self) -> None:
        for writer in self._writers:
            writer.write()

    def after_train(self) -> None:
        # If one of them fails (the disk may be full), the others are still closed.
        with ExitStack() as stack:
            if self._bar is not None:
                stack.callback(self._bar.close)
            for writer in self._writers:
                stack.callback(writer.close)
            for writer in self._writers:
                writer.write()
        self._writers, self._bar = [], None
