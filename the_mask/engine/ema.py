"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from the_mask.weights.sharding import like


class ExponentialMovingAverage:
    """Keeps ``average <- d * average + (1 - d) * weights`` for every floating tensor of a model's state dict.

    ``d = min(decay, (1 + n) / (10 + n))`` after ``n`` updates, so that the random initialisation does not dominate a
    short run. Other tensors (counters) are copied. Averages are kept in at least float32.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: source of the first average.
            decay: in [0, 1).

        Raises:
            ValueError: decay out of range.
        """
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"SOLVER.EMA.DECAY {decay}: expected a number in [0, 1)")
        self.decay = decay
        self.updates = 0
        self.average = {name: _shadow(value) for name, value in model.state_dict().items()}

    def current_decay(self) -> float:
        """Decay of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the model's current weights."""
        weight = 1.0 - self.current_decay()
        self.updates += 1
        for name, value in model.state_dict().items():
            average = self.average[name]
            if average.is_floating_point():
                # lerp keeps constants (frozen layers) exactly.
                average.lerp_(value.to(average.dtype), weight)
            else:
                average.copy_(value)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Use the averaged weights in the model inside the block, and restore its own weights afterwards."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for name, value in model.state_dict().items():
            kept = value.to(self.average[name].dtype, copy=True)
            value.copy_(self.average[name])
            self.average[name] = kept

    def state_dict(self) -> dict[str, Tensor | int | dict[str, Tensor]]:
        """``{"updates": int, "average": {name: tensor}}``."""
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        """Load the result of :meth:`state_dict`, onto the devices of the current average."""
        self.updates = int(state["updates"])
        for name, value in self.average.items():
            value.copy_(like(state["average"][name], value))


def _shadow(value: Tensor) -> Tensor:
    value = value.detach()
    if value.is_floating_point() and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value.clone()
