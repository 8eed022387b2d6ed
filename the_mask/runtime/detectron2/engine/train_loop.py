"""The training loop and its hooks."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..utils import comm
from ..utils.events import EventStorage, get_event_storage

__all__ = ["HookBase", "SimpleTrainer", "TrainerBase"]


class HookBase:
    """What happens around the steps of a trainer; ``trainer`` is set when the hook is registered."""

    trainer: TrainerBase

    def before_train(self) -> None:
        """Called before the first iteration."""

    def after_train(self) -> None:
        """Called after the last iteration, also when training ends by an exception."""

    def before_step(self) -> None:
        """Called before each iteration."""

    def after_backward(self) -> None:
        """Called after the backward pass of each iteration."""

    def after_step(self) -> None:
        """Called after each iteration."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint should hold; a hook that returns something defines ``load_state_dict`` too."""
        return {}


class TrainerBase:
    """A loop over iterations that calls ``run_step`` and hooks, and nothing more.

    ``iter`` is the current iteration, ``start_iter`` the first, ``max_iter`` the end, and ``storage`` the
    ``EventStorage`` open during training.
    """

    def __init__(self) -> None:
        self._hooks: list[HookBase] = []
        self.iter: int = 0
        self.start_iter: int = 0
        self.max_iter: int
        self.storage: EventStorage

    def register_hooks(self, hooks: list[HookBase | None]) -> None:
        """Add hooks, called in this order; ``None`` entries are left out."""
        for hook in hooks:
            if hook is None:
                continue
            assert isinstance(hook, HookBase), hook
            # Weak, because the trainer holds the hook: a cycle would keep both, and GPU memory, alive.
            hook.trainer = weakref.proxy(self)
            self._hooks.append(hook)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run the iterations ``start_iter .. max_iter - 1``."""
        logger = logging.getLogger(__name__)
        logger.info("Starting training from iteration %d", start_iter)
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                # Hooks tell a finished training from a broken one by iter == max_iter in after_train.
                self.iter += 1
            except Exception:
                logger.exception("Exception during training:")
                raise
            finally:
                self.after_train()

    def before_train(self) -> None:
        """Call the hooks before the first iteration."""
        for hook in self._hooks:
            hook.before_train()

    def after_train(self) -> None:
        """Call the hooks after the last iteration."""
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.after_train()

    def before_step(self) -> None:
        """Call the hooks before an iteration."""
        # The storage follows the trainer, so that numbers put by run_step and by hooks carry one iteration.
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.before_step()

    def after_backward(self) -> None:
        """Call the hooks after a backward pass; ``run_step`` calls this."""
        for hook in self._hooks:
            hook.after_backward()

    def after_step(self) -> None:
        """Call the hooks after an iteration."""
        for hook in self._hooks:
            hook.after_step()

    def run_step(self) -> None:
        """Do one iteration."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the iteration and the states of hooks, by the name of their class."""
        state: dict[str, Any] = {"iteration": self.iter}
        hooks: dict[str, Any] = {}
        for hook in self._hooks:
            own = hook.state_dict()
            name = type(hook).__qualname__
            # The first of several hooks of one class counts.
            if own and name not in hooks:
                hooks[name] = own
        if hooks:
            state["hooks"] = hooks
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned; a state without its hook is warned about."""
        logger = logging.getLogger(__name__)
        self.iter = state_dict["iteration"]
        for name, state in state_dict.get("hooks", {}).items():
            for hook in self._hooks:
                if type(hook).__qualname__ == name:
                    hook.load_state_dict(state)  # type: ignore[attr-defined]
                    break
            else:
                logger.warning("Cannot find the hook '%s', its state_dict is ignored.", name)


class SimpleTrainer(TrainerBase):
    """One model that returns a dict of losses, one optimiser, one data loader."""

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        async_write_metrics: bool = False,
    ) -> None:
        """Train ``model``.

        Args:
            model: maps an item of the loader to a dict of losses, or to one loss.
            data_loader: endless iterable.
            optimizer: over the parameters of ``model``.
            gather_metric_period: iterations between gatherings of losses from all ranks.
            zero_grad_before_forward: clear gradients before the forward pass rather than after it.
            async_write_metrics: gather losses in another thread.
        """
        super().__init__()
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.gather_metric_period = gather_metric_period
        self.zero_grad_before_forward = zero_grad_before_forward
        self.async_write_metrics = async_write_metrics
        self._data_loader_iter_obj: Iterator[Any] | None = None
        self.concurrent_executor = ThreadPoolExecutor(max_workers=1)

    def run_step(self) -> None:
        assert self.model.training, "[SimpleTrainer] model was changed to eval mode!"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        if self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        loss_dict = self.model(data)
        if isinstance(loss_dict, Tensor):
            losses = loss_dict
            loss_dict = {"total_loss": loss_dict}
        else:
            losses = sum(loss_dict.values())
        if not self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        losses.backward()
        self.after_backward()
        if self.async_write_metrics:
            self.concurrent_executor.submit(self._write_metrics, loss_dict, data_time, iter=self.iter)
        else:
            self._write_metrics(loss_dict, data_time)
        # Last, so that a loss that is not finite is reported before it spoils the weights.
        self.optimizer.step()

    @property
    def _data_loader_iter(self) -> Iterator[Any]:
        # Late: worker processes should not start before the first step.
        if self._data_loader_iter_obj is None:
            self._data_loader_iter_obj = iter(self.data_loader)
        return self._data_loader_iter_obj

    def reset_data_loader(self, data_loader_builder: Callable[[], Iterable[Any]]) -> None:
        """Drop the loader and use the one that ``data_loader_builder`` returns."""
        del self.data_loader
        self.data_loader = data_loader_builder()
        self._data_loader_iter_obj = None

    def _write_metrics(
        self, loss_dict: Mapping[str, Tensor], data_time: float, prefix: str = "", iter: int | None = None
    ) -> None:
        iteration = self.iter if iter is None else iter
        if (iteration + 1) % self.gather_metric_period == 0:
            try:
                self.write_metrics(loss_dict, data_time, iteration, prefix)
            except Exception:
                # Logged here too, because an exception in the thread of async_write_metrics is never seen.
                logging.getLogger(__name__).exception("Exception in writing metrics: ")
                raise

    @staticmethod
    def write_metrics(loss_dict: Mapping[str, Tensor], data_time: float, cur_iter: int, prefix: str = "") -> None:
        """Put the losses, averaged over ranks, and the longest loading time into the storage.

        Raises:
            FloatingPointError: the total loss is not finite.
        """
        metrics = {name: value.detach().cpu().item() for name, value in loss_dict.items()}
        metrics["data_time"] = data_time
        storage = get_event_storage()
        # Every rank keeps its own; rank 0 also the longest of all, below.
        storage.put_scalar("rank_data_time", data_time, cur_iter=cur_iter)
        gathered = comm.gather(metrics)
        if not comm.is_main_process():
            return
        storage.put_scalar("data_time", np.max([m.pop("data_time") for m in gathered]), cur_iter=cur_iter)
        averaged = {name: np.mean([m[name] for m in gathered]) for name in gathered[0]}
        total = sum(averaged.values())
        if not np.isfinite(total):
            raise FloatingPointError(f"Loss became infinite or NaN at iteration={cur_iter}!\nloss_dict = {averaged}")
        storage.put_scalar(f"{prefix}total_loss", total, cur_iter=cur_iter)
        if len(averaged) > 1:
            storage.put_scalars(cur_iter=cur_iter, **averaged)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])

    def after_train(self) -> None:
        super().after_train()
        self.concurrent_executor.shutdown(wait=True)
