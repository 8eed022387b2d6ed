"""The learning-rate schedule as a pure function of the iteration.

The schedule is not stored in checkpoints, so a run can be resumed with another ``MAX_ITER`` or ``BASE_LR``.
"""

from __future__ import annotations

from dataclasses import dataclass

from detectron2.config import CfgNode

from the_mask.config.keys.solver import SCHEDULES, WARMUP_METHODS


def warmup_factor(iteration: int, warmup_iters: int, start: float, method: str = "linear") -> float:
    """Factor of the warm-up at an iteration: ``start`` at 0, 1 from ``warmup_iters`` on."""
    if iteration >= warmup_iters:
        return 1.0
    if method == "constant":
        return start
    if method == "linear":
        return start + (1.0 - start) * iteration / warmup_iters
    raise ValueError(f"SOLVER.WARMUP_METHOD {method!r}: expected one of {', '.join(WARMUP_METHODS)}")


def poly_factor(iteration: int, max_iter: int, power: float = 0.9, end: float = 0.0) -> float:
    """``(1 - iteration/max_iter)^power``, not below ``end``; ``end`` from ``max_iter`` on."""
    return max(end, max(0.0, 1.0 - iteration / max_iter) ** power)


def floored_poly_factor(iteration: int, max_iter: int, power: float = 0.9, floor: float = 0.0) -> float:
    """``(1 - floor) * (1 - iteration/max_iter)^power + floor``: unlike :func:`poly_factor`, falls until the end."""
    return (1.0 - floor) * poly_factor(iteration, max_iter, power) + floor


@dataclass(frozen=True)
class WarmupPoly:
    """Warm-up, then polynomial decay (spec of both THE-Mask and Mask2Former: power 0.9, no warm-up).

    With ``backbone_warmup_iters`` it has two stages, as in EoMT: the heads warm up while the backbone has rate 0, then
    the backbone warms up; each decays from the end of its own warm-up to ``max_iter``.

    Attributes:
        base_lr: rate at factor 1.
        max_iter: iterations of the whole training.
        power, end: of :func:`poly_factor` or :func:`floored_poly_factor`; ``end`` is a share of ``base_lr``.
        warmup_iters, warmup_start, warmup_method: of :func:`warmup_factor`.
        name: one of :data:`SCHEDULES`; decides the meaning of ``end``.
        backbone_warmup_iters: warm-up of the backbone, after that of the heads; 0: all parameters have the same rate.
    """

    base_lr: float
    max_iter: int
    power: float = 0.9
    end: float = 0.0
    warmup_iters: int = 0
    warmup_start: float = 0.001
    warmup_method: str = "linear"
    name: str = "WarmupPolyLR"
    backbone_warmup_iters: int = 0

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ValueError(f"SOLVER.LR_SCHEDULER_NAME {self.name!r}: expected one of {', '.join(SCHEDULES)}")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> WarmupPoly:
        solver = cfg.SOLVER
        return cls(
            base_lr=solver.BASE_LR,
            max_iter=solver.MAX_ITER,
            power=solver.POLY_LR_POWER,
            end=solver.POLY_LR_END,
            warmup_iters=solver.WARMUP_ITERS,
            warmup_start=solver.WARMUP_FACTOR,
            warmup_method=solver.WARMUP_METHOD,
            name=solver.LR_SCHEDULER_NAME,
            backbone_warmup_iters=solver.BACKBONE_WARMUP_ITERS,
        )

    def __call__(self, iteration: int) -> float:
        """Learning rate of an iteration (counted from 0), before any group's multiplier."""
        if self.backbone_warmup_iters:
            return self._stage(iteration, 0, self.warmup_iters)
        return self.base_lr * self._warmup(iteration, self.warmup_iters) * self._decay(iteration, self.max_iter)

    def backbone(self, iteration: int) -> float:
        """Learning rate of the backbone; 0 while the heads warm up."""
        if not self.backbone_warmup_iters:
            return self(iteration)
        return self._stage(iteration, self.warmup_iters, self.backbone_warmup_iters)

    def _stage(self, iteration: int, first: int, warmup_iters: int) -> float:
        """A warm-up starting at iteration ``first``, and the decay after it."""
        since = iteration - first
        if since < 0:
            return 0.0
        if since < warmup_iters:
            return self.base_lr * self._warmup(since, warmup_iters)
        return self.base_lr * self._decay(since - warmup_iters, max(self.max_iter - first - warmup_iters, 1))

    def _warmup(self, iteration: int, iterations: int) -> float:
        return warmup_factor(iteration, iterations, self.warmup_start, self.warmup_method)

    def _decay(self, iteration: int, iterations: int) -> float:
        decay = poly_factor if self.name == "WarmupPolyLR" else floored_poly_factor
        return decay(iteration, iterations, self.power, self.end)
