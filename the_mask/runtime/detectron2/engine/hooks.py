"""Hooks for timing, writing, checkpoints, learning rates and evaluation."""

from __future__ import annotations

import datetime
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from fvcore.common.checkpoint import PeriodicCheckpointer as _PeriodicCheckpointer
from fvcore.common.param_scheduler import ParamScheduler
from fvcore.common.timer import Timer

from .._missing import not_provided
from ..solver import LRMultiplier
from ..utils import comm
from ..utils.events import EventWriter
from .train_loop import HookBase

__all__ = ["CallbackHook", "EvalHook", "IterationTimer", "LRScheduler", "PeriodicCheckpointer", "PeriodicWriter"]

Callback = Callable[[Any], None]


class CallbackHook(HookBase):
    """Functions, called with the trainer, as a hook."""

    def __init__(
        self,
        *,
        before_train: Callback | None = None,
        after_train: Callback | None = None,
        before_step: Callback | None = None,
        after_step: Callback | None = None,
    ) -> None:
        self._before_train = before_train
        self._before_step = before_step
        self._after_step = after_step
        self._after_train = after_train

    def before_train(self) -> None:
        if self._before_train:
            self._before_train(self.trainer)

    def after_train(self) -> None:
        if self._after_train:
            self._after_train(self.trainer)
        # The functions may be closures over the trainer.
        del self._before_train, self._after_train, self._before_step, self._after_step

    def before_step(self) -> None:
        if self._before_step:
            self._before_step(self.trainer)

    def after_step(self) -> None:
        if self._after_step:
            self._after_step(self.trainer)


class IterationTimer(HookBase):
    """Put the seconds of every iteration under ``time``, and log a summary at the end. Belongs first in the list."""

    def __init__(self, warmup_iter: int = 3) -> None:
        """Leave the first ``warmup_iter`` iterations out."""
        self._warmup_iter = warmup_iter
        self._step_timer = Timer()
        self._start_time = time.perf_counter()
        self._total_timer = Timer()

    def before_train(self) -> None:
        self._start_time = time.perf_counter()
        self._total_timer.reset()
        self._total_timer.pause()

    def after_train(self) -> None:
        logger = logging.getLogger(__name__)
        total = time.perf_counter() - self._start_time
        in_steps = self._total_timer.seconds()
        steps = self.trainer.storage.iter + 1 - self.trainer.start_iter - self._warmup_iter
        if steps > 0 and in_steps > 0:
            logger.info(
                "Overall training speed: %d iterations in %s (%.4f s / it)", steps, _clock(in_steps), in_steps / steps
            )
        logger.info("Total training time: %s (%s on hooks)", _clock(total), _clock(total - in_steps))

    def before_step(self) -> None:
        self._step_timer.reset()
        self._total_timer.resume()

    def after_step(self) -> None:
        done = self.trainer.storage.iter - self.trainer.start_iter + 1
        if done >= self._warmup_iter:
            self.trainer.storage.put_scalars(time=self._step_timer.seconds())
        else:
            self._start_time = time.perf_counter()
            self._total_timer.reset()
        self._total_timer.pause()


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))


class PeriodicWriter(HookBase):
    """Call ``write`` of event writers every ``period`` iterations and at the end."""

    def __init__(self, writers: Sequence[EventWriter], period: int = 20) -> None:
        self._writers = writers
        for writer in writers:
            assert isinstance(writer, EventWriter), writer
        self._period = period

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self._period == 0 or self.trainer.iter == self.trainer.max_iter - 1:
            for writer in self._writers:
                writer.write()

    def after_train(self) -> None:
        for writer in self._writers:
            # Hooks after this one may have put something in their after_train.
            writer.write()
            writer.close()


class PeriodicCheckpointer(_PeriodicCheckpointer, HookBase):
    """fvcore's ``PeriodicCheckpointer`` as a hook: every ``period`` iterations and after the last."""

    def before_train(self) -> None:
        self.max_iter = self.trainer.max_iter

    def after_step(self) -> None:
        self.step(self.trainer.iter)


class LRScheduler(HookBase):
    """Step a learning rate scheduler after every iteration, and put the rate under ``lr``."""

    def __init__(self, optimizer: torch.optim.Optimizer | None = None, scheduler: Any = None) -> None:
        """Use the trainer's ``optimizer`` and ``scheduler`` where none is given.

        Args:
            optimizer: whose rates change.
            scheduler: a torch scheduler, or an fvcore ``ParamScheduler`` that gives the factor of the base rates.
        """
        self._optimizer = optimizer
        self._scheduler = scheduler

    def before_train(self) -> None:
        self._optimizer = self._optimizer or self.trainer.optimizer  # type: ignore[attr-defined]
        if isinstance(self.scheduler, ParamScheduler):
            self._scheduler = LRMultiplier(
                self._optimizer, self.scheduler, self.trainer.max_iter, last_iter=self.trainer.iter - 1
            )
        self._best_param_group_id = self.get_best_param_group_id(self._optimizer)

    @staticmethod
    def get_best_param_group_id(optimizer: torch.optim.Optimizer) -> int:
        """Return the parameter group whose rate is worth showing.

        The one with most parameters; or, where each parameter has its own group, the first with the commonest rate.
        """
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        if max(sizes) > 1:
            return sizes.index(max(sizes))
        rates = [group["lr"] for group in optimizer.param_groups]
        return rates.index(Counter(rates).most_common()[0][0])

    def after_step(self) -> None:
        rate = self._optimizer.param_groups[self._best_param_group_id]["lr"]  # type: ignore[union-attr]
        self.trainer.storage.put_scalar("lr", rate, smoothing_hint=False)
        self.scheduler.step()

    @property
    def scheduler(self) -> Any:
        """The scheduler in use."""
        return self._scheduler or self.trainer.scheduler  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict() if isinstance(self.scheduler, torch.optim.lr_scheduler.LRScheduler) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of the scheduler."""
        if isinstance(self.scheduler, torch.optim.lr_scheduler.LRScheduler):
            logging.getLogger(__name__).info("Loading scheduler from state_dict ...")
            self.scheduler.load_state_dict(state_dict)


class EvalHook(HookBase):
    """Call an evaluation function every ``eval_period`` iterations and after a finished training."""

    def __init__(self, eval_period: int, eval_function: Callable[[], Any], eval_after_train: bool = True) -> None:
        """Every rank must have this hook, because they wait for each other.

        Args:
            eval_period: iterations; 0 is only at the end.
            eval_function: returns a nested dict of numbers, which are put into the storage, or nothing.
            eval_after_train: evaluate at the end.
        """
        self._period = eval_period
        self._func = eval_function
        self._eval_after_train = eval_after_train

    def _do_eval(self) -> None:
        results = self._func()
        if results:
            assert isinstance(results, dict), f"Eval function must return a dict. Got {results} instead."
            flat = _flatten(results)
            for name, value in flat.items():
                try:
                    flat[name] = float(value)
                except (TypeError, ValueError) as error:
                    raise ValueError(
                        f"[EvalHook] eval_function should return a nested dict of float. Got '{name}: {value}' instead."
                    ) from error
            self.trainer.storage.put_scalars(**flat, smoothing_hint=False)
        # Ranks that evaluate nothing would otherwise time out in the next step.
        comm.synchronize()

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        # The last one is left to after_train.
        if self._period > 0 and next_iter % self._period == 0 and next_iter != self.trainer.max_iter:
            self._do_eval()

    def after_train(self) -> None:
        if self._eval_after_train and self.trainer.iter + 1 >= self.trainer.max_iter:
            self._do_eval()
        # The function may be a closure over the trainer.
        del self._func


def _flatten(results: Mapping[str, Any]) -> dict[str, Any]:
    """Join the keys of nested dicts by ``/``."""
    flat: dict[str, Any] = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{inner}": leaf for inner, leaf in _flatten(value).items()})
        else:
            flat[key] = value
    return flat


__getattr__ = not_provided(__name__)
