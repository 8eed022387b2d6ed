"""A model, a loader and a trainer small enough to step in a millisecond, and the debug config on tiny real clips."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch import nn

from the_mask.config import load_config
from the_mask.data import register_all
from the_mask.engine import Trainer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DEBUG = CONFIGS / "debug" / "mask2former_debug.yaml"
FEATURES = 6


class FakeModel(nn.Module):
    """Linear regression with a norm, dropout and draws from every global generator, so that a lost state shows."""

    def __init__(self, dropout: float = 0.0, noise: float = 0.0) -> None:
        super().__init__()
        self.backbone = nn.Linear(FEATURES, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 1)
        self.noise = noise
        self.iterations: list[int] = []
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def set_iteration(self, iteration: int) -> None:
        self.iterations.append(iteration)

    def forward(self, clips: list[Sample]) -> dict[str, torch.Tensor]:
        device = self.head.weight.device
        x = torch.stack([clip.x for clip in clips]).to(device)
        y = torch.stack([clip.y for clip in clips]).to(device)
        if self.training:
            self.count += 1
        if self.noise:
            x = x + self.noise * (torch.rand_like(x) + random.random() + np.random.rand())  # noqa: NPY002
        out = self.head(self.dropout(self.norm(self.backbone(x)).relu()))[:, 0].float()
        return {"loss_square": ((out - y) ** 2).mean(), "loss_size": 0.01 * out.abs().mean()}


@dataclass(frozen=True)
class Sample:
    """What stands for a clip: an input and its target."""

    x: torch.Tensor
    y: torch.Tensor
    file_names: tuple[str, ...]


def fake_clip(position: int, bad: bool = False) -> Sample:
    """The sample at a position of the endless stream; ``bad`` makes its target NaN."""
    generator = torch.Generator().manual_seed(position)
    x = torch.randn(FEATURES, generator=generator)
    y = x.sum() * float("nan") if bad else x[0] - 2 * x[1]
    return Sample(x, y, (f"video/{position:03d}.jpg",))


class FakeTrainer(Trainer):
    """Trainer of :class:`FakeModel`; class attributes change the task."""

    dropout = 0.0
    noise = 0.0
    bad_position = -1
    broken_position = -1
    scores: list[float] | None = None

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return FakeModel(cls.dropout, cls.noise).to(cfg.MODEL.DEVICE)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int) -> Iterator[list[Sample]]:
        total, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUM_STEPS * comm.get_world_size()
        size = total // parts
        torch.rand(3)  # creating a loader may draw from the global generator
        for iteration in itertools.count(start_iter):
            for step in range(cfg.SOLVER.ACCUM_STEPS):
                part = comm.get_rank() * cfg.SOLVER.ACCUM_STEPS + step
                first = iteration * total + part * size
                positions = range(first, first + size)
                if cls.broken_position in positions:
                    raise ValueError(f"video/{cls.broken_position:03d}.jpg is truncated")
                yield [fake_clip(p, bad=p == cls.bad_position) for p in positions]

    @classmethod
    def evaluate_model(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        assert not model.training
        torch.rand(1), random.random(), np.random.rand()  # an evaluation may draw too  # noqa: NPY002
        with torch.no_grad():
            loss = float(model([fake_clip(p) for p in range(100, 108)])["loss_square"])
        return {"sem_seg": {"mIoU": -loss, "VC8": float("nan")}}


def variant(**attributes: Any) -> type[FakeTrainer]:
    """A FakeTrainer with other class attributes."""
    return type("FakeTrainer", (FakeTrainer,), attributes)


def fake_cfg(folder: Path, *overrides: Any) -> CfgNode:
    """A config for :class:`FakeTrainer` that writes into a folder."""
    base = ["OUTPUT_DIR", str(folder), "MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", 6, "SOLVER.IMS_PER_BATCH", 4]
    base += ["SOLVER.CHECKPOINT_PERIOD", 0, "SOLVER.BASE_LR", 0.05, "SOLVER.LOG_PERIOD", 1, "SEED", 7]
    base += ["DATASETS.TEST", ("fake",), "TEST.EVAL_PERIOD", -1, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1.0]
    return load_config(None, [*base, *overrides])


def debug_cfg(folder: Path, *overrides: Any, config: Path = DEBUG) -> CfgNode:
    """A debug config on the tiny moving_shapes of the ``tiny_shapes`` fixture."""
    classes = len(MetadataCatalog.get("moving_shapes_train").stuff_classes)
    base = ["OUTPUT_DIR", str(folder), "MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", classes]
    return load_config(config, [*base, *overrides])


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of a trainer's weights."""
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Nested containers of tensors and builtins are equal bit for bit."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert ours == theirs, where


def hooked(action: Callable[[Trainer], None], at: int, when: str = "before_step") -> Any:
    """A hook that calls ``action(trainer)`` at one iteration."""
    from detectron2.engine import HookBase

    class Hook(HookBase):
        pass

    def call(self: Any) -> None:
        if self.trainer.iter == at:
            action(self.trainer)

    setattr(Hook, when, call)
    return Hook()


def train_both(cfg: CfgNode, root: str, fake: CfgNode) -> None:
    """What each process of a distributed test does: a fake training, then a real one that leaves weights and losses."""
    FakeTrainer(fake).train()
    bad = variant(bad_position=6)(fake_cfg(Path(cfg.OUTPUT_DIR) / "bad"))
    try:
        bad.train()
    except FloatingPointError as error:
        (Path(cfg.OUTPUT_DIR) / f"error{comm.get_rank()}.txt").write_text(str(error))
    register_all(root)
    trainer = Trainer(cfg)
    losses: list[float] = []
    trainer.register_hooks([_LossKeeper(losses)])
    trainer.train()
    state = {"model": dict(trainer.model.state_dict()), "losses": losses, "results": dict(trainer.results["sem_seg"])}
    torch.save(state, os.path.join(cfg.OUTPUT_DIR, f"rank{comm.get_rank()}.pth"))


def _loss_keeper() -> type:
    from detectron2.engine import HookBase

    class LossKeeper(HookBase):
        def __init__(self, losses: list[float]) -> None:
            self.losses = losses

        def after_step(self) -> None:
            self.losses.append(self.trainer.storage.latest()["total_loss"][0])

    return LossKeeper


_LossKeeper = _loss_keeper()
