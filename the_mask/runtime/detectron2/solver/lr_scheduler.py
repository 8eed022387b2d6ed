"""fvcore's parameter schedules as a torch scheduler, and warm-up."""

from __future__ import annotations

from typing import Any

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch.optim.lr_scheduler import LRScheduler


class WarmupParamScheduler(CompositeParamScheduler):
    """A schedule whose beginning is replaced by a warm-up."""

    def __init__(
        self,
        scheduler: ParamScheduler,
        warmup_factor: float,
        warmup_length: float,
        warmup_method: str = "linear",
        rescale_interval: bool = False,
    ) -> None:
        """Warm up to where ``scheduler`` is at the end of the warm-up.

        Args:
            scheduler: the schedule without warm-up.
            warmup_factor: the value of the warm-up is the schedule's first value times this, at its start.
            warmup_length: share of training, 0..1.
            warmup_method: ``"linear"`` or ``"constant"``.
            rescale_interval: squeeze the whole schedule into the rest, instead of cutting off its beginning.
        """
        end_value = scheduler(0.0 if rescale_interval else warmup_length)
        start_value = warmup_factor * scheduler(0.0)
        if warmup_method == "constant":
            warmup: ParamScheduler = ConstantParamScheduler(start_value)
        elif warmup_method == "linear":
            warmup = LinearParamScheduler(start_value, end_value)
        else:
            raise ValueError(f"Unknown warmup method: {warmup_method}")
        super().__init__(
            [warmup, scheduler],
            interval_scaling=["rescaled", "rescaled" if rescale_interval else "fixed"],
            lengths=[warmup_length, 1 - warmup_length],
        )


class LRMultiplier(LRScheduler):
    """Each group's rate is its base rate times ``multiplier(iteration / max_iter)``."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, multiplier: ParamScheduler, max_iter: int, last_iter: int = -1
    ) -> None:
        """Schedule ``optimizer``.

        Args:
            optimizer: whose rates change.
            multiplier: factor over the share of training done, 0..1.
            max_iter: length of training.
            last_iter: the last iteration done, -1 for none.
        """
        if not isinstance(multiplier, ParamScheduler):
            raise ValueError(
                f"_LRMultiplier(multiplier=) must be an instance of fvcore ParamScheduler. Got {multiplier} instead."
            )
        self._multiplier = multiplier
        self._max_iter = max_iter
        super().__init__(optimizer, last_epoch=last_iter)

    def state_dict(self) -> dict[str, Any]:
        """Return base rates and position; the schedule itself comes from the config."""
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the rate of every group."""
        factor = self._multiplier(self.last_epoch / self._max_iter)
        return [base * factor for base in self.base_lrs]
