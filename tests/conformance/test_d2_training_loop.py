"""Documented behaviour of detectron2.engine: the loop, the hooks, the command line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import (
    HookBase,
    SimpleTrainer,
    TrainerBase,
    default_argument_parser,
    hooks,
)
from detectron2.solver import LRMultiplier
from detectron2.utils.events import EventWriter, JSONWriter, get_event_storage
from fvcore.common.param_scheduler import LinearParamScheduler
from torch import Tensor, nn


class Recorder(HookBase):
    def __init__(self, name: str, calls: list[tuple]) -> None:
        self.name, self.calls = name, calls

    def record(self, event: str) -> None:
        self.calls.append((self.name, event, self.trainer.iter, self.trainer.storage.iter))

    def before_train(self) -> None:
        self.record("before_train")

    def after_train(self) -> None:
        self.record("after_train")

    def before_step(self) -> None:
        self.record("before_step")

    def after_backward(self) -> None:
        self.record("after_backward")

    def after_step(self) -> None:
        self.record("after_step")


class Trainer(TrainerBase):
    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.fails_at = fails_at

    def run_step(self) -> None:
        if self.iter == self.fails_at:
            raise ValueError("broken")
        self.after_backward()


def test_order_of_hooks() -> None:
    calls: list[tuple] = []
    trainer = Trainer()
    trainer.register_hooks([Recorder("a", calls), None, Recorder("b", calls)])
    trainer.train(3, 5)
    steps = ["before_step", "after_backward", "after_step"]
    expected = [("before_train", 3), *((event, i) for i in (3, 4) for event in steps), ("after_train", 5)]
    assert calls == [(name, event, i, i) for event, i in expected for name in "ab"]
    assert (trainer.iter, trainer.start_iter, trainer.max_iter) == (5, 3, 5)
    assert trainer.state_dict() == {"iteration": 5}


def test_after_train_runs_when_a_step_fails() -> None:
    calls: list[tuple] = []
    trainer = Trainer(fails_at=4)
    trainer.register_hooks([Recorder("a", calls)])
    with pytest.raises(ValueError, match="broken"):
        trainer.train(3, 6)
    assert calls[-2:] == [("a", "before_step", 4, 4), ("a", "after_train", 4, 4)]


def test_trainer_base_and_wrong_hooks() -> None:
    with pytest.raises(NotImplementedError):
        TrainerBase().run_step()
    with pytest.raises(AssertionError):
        Trainer().register_hooks([3])


class Stateful(HookBase):
    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def test_state_of_hooks() -> None:
    trainer = Trainer()
    trainer.register_hooks([Stateful(1), Recorder("a", [])])
    assert trainer.state_dict() == {"iteration": 0, "hooks": {"Stateful": {"value": 1}}}
    other, hook = Trainer(), Stateful(9)
    other.register_hooks([hook])
    other.load_state_dict({"iteration": 8, "hooks": {"Stateful": {"value": 1}, "Gone": {}}})
    assert (other.iter, hook.value) == (8, 1)


class Model(nn.Module):
    def __init__(self, losses: Callable[[Tensor], object] = lambda y: {"loss_a": y, "loss_b": 2 * y}) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 1)
        self.losses = losses

    def forward(self, x: Tensor) -> object:
        return self.losses(self.linear(x).pow(2).mean())


class Data:
    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(4, 2, generator=generator)


def optimizer_of(model: Model) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("kwargs", [{}, {"zero_grad_before_forward": True}, {"gather_metric_period": 2}])
def test_simple_trainer_equals_a_plain_loop(kwargs: dict[str, object]) -> None:
    reference, data = Model(), iter(Data())
    optimizer, losses = optimizer_of(reference), []
    for _ in range(5):
        loss = sum(reference(next(data)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    model = Model().eval()
    trainer = SimpleTrainer(model, Data(), optimizer_of(model), **kwargs)
    trainer.train(0, 5)
    assert model.training
    assert model.linear.weight.equal(reference.linear.weight)
    period = kwargs.get("gather_metric_period", 1)
    expected = [(loss, i) for i, loss in enumerate(losses) if (i + 1) % period == 0]
    logged = trainer.storage.history("total_loss").values()
    assert [i for _, i in logged] == [i for _, i in expected]
    assert [value for value, _ in logged] == pytest.approx([value for value, _ in expected])
    assert {"loss_a", "loss_b", "data_time"} <= set(trainer.storage.latest())
    assert sorted(trainer.state_dict()) == ["iteration", "optimizer"]


def test_simple_trainer_takes_one_loss_and_refuses_nan_and_eval_mode() -> None:
    model = Model(lambda y: y)
    trainer = SimpleTrainer(model, Data(), optimizer_of(model))
    trainer.train(0, 1)
    assert "total_loss" in trainer.storage.latest()
    model = Model(lambda y: {"loss": y * math.nan})
    before = model.linear.weight.clone()
    with pytest.raises(FloatingPointError, match="iteration=0"):
        SimpleTrainer(model, Data(), optimizer_of(model)).train(0, 2)
    assert model.linear.weight.equal(before)
    trainer = SimpleTrainer(model, Data(), optimizer_of(model))
    model.eval()
    with pytest.raises(AssertionError, match="eval mode"):
        trainer.run_step()


def test_reset_data_loader() -> None:
    model = Model()
    trainer = SimpleTrainer(model, [torch.zeros(1, 2)], optimizer_of(model))
    with pytest.raises(StopIteration):
        trainer.train(0, 2)
    trainer.reset_data_loader(Data)
    trainer.train(0, 2)


class Writer(EventWriter):
    def __init__(self) -> None:
        self.iterations: list[object] = []

    def write(self) -> None:
        self.iterations.append(get_event_storage().iter)

    def close(self) -> None:
        self.iterations.append("closed")


def test_all_hooks_together(tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []

    def note(name: str) -> Callable[[TrainerBase], None]:
        return lambda trainer: calls.append((name, trainer.iter))

    model, writer = Model(), Writer()
    optimizer = torch.optim.SGD(
        [{"params": [model.linear.weight], "lr": 0.5}, {"params": [model.linear.bias], "lr": 0.1}], lr=1.0
    )
    trainer = SimpleTrainer(model, Data(), optimizer)
    checkpointer = DetectionCheckpointer(model, str(tmp_path), trainer=trainer)
    evaluations: list[int] = []

    def evaluate() -> dict[str, object]:
        evaluations.append(trainer.iter)
        return {"sem_seg": {"mIoU": 1.5, "classes": {"car": 2}}, "n": 3}

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.CallbackHook(before_train=note("start"), after_train=note("end"), after_step=note("step")),
            hooks.LRScheduler(optimizer, LinearParamScheduler(1.0, 0.0)),
            hooks.PeriodicCheckpointer(checkpointer, 3, max_to_keep=1),
            hooks.EvalHook(2, evaluate),
            hooks.PeriodicWriter([writer, JSONWriter(str(tmp_path / "metrics.json"))], 2),
        ]
    )
    trainer.train(0, 7)
    assert calls == [("start", 0), *(("step", i) for i in range(7)), ("end", 7)]
    rates = [value for value, _ in trainer.storage.history("lr").values()]
    assert rates == pytest.approx([0.5 * (1 - i / 7) for i in range(7)])
    assert evaluations == [1, 3, 5, 7]
    assert trainer.storage.latest()["sem_seg/classes/car"] == (2.0, 7)
    assert trainer.storage.smoothing_hints()["sem_seg/mIoU"] is False
    assert writer.iterations == [1, 3, 5, 6, 7, "closed"]
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "metrics.json", "model_0000005.pth", "model_final.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert (sorted(saved), saved["iteration"]) == (["iteration", "model", "trainer"], 6)
    assert saved["trainer"]["hooks"] == {"LRScheduler": {"base_lrs": [0.5, 0.1], "last_epoch": 7}}
    timed = trainer.storage.history("time").values()
    assert [i for _, i in timed] == [2, 3, 4, 5, 6]  # the first iterations are left out
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert {"lr", "total_loss", "iteration"} <= set(lines[0])


@pytest.mark.parametrize(
    ("kwargs", "fails_at", "expected"),
    [
        ({"eval_period": 0}, None, [6]),
        ({"eval_period": 3}, None, [2, 6]),
        ({"eval_period": 3, "eval_after_train": False}, None, [2]),
        ({"eval_period": 3}, 4, [2]),
        ({"eval_period": 3}, 5, [2, 5]),
    ],
)
def test_when_eval_hook_evaluates(kwargs: dict[str, int], fails_at: int | None, expected: list[int]) -> None:
    evaluations: list[int] = []
    trainer = Trainer(fails_at)
    trainer.register_hooks([hooks.EvalHook(eval_function=lambda: evaluations.append(trainer.iter), **kwargs)])
    if fails_at is None:
        trainer.train(0, 6)
    else:
        with pytest.raises(ValueError, match="broken"):
            trainer.train(0, 6)
    assert evaluations == expected


def test_eval_hook_refuses_what_is_not_a_number() -> None:
    for results, error in (({"a": "word"}, ValueError), ([1], AssertionError)):
        trainer = Trainer()
        trainer.register_hooks([hooks.EvalHook(1, lambda results=results: results)])
        with pytest.raises(error):
            trainer.train(0, 2)


def test_lr_hook_with_a_torch_scheduler_of_the_trainer() -> None:
    model = Model()
    trainer = Trainer()
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer.scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 2)
    trainer.register_hooks([hooks.LRScheduler()])
    trainer.optimizer.step()
    trainer.train(0, 5)
    assert [v for v, _ in trainer.storage.history("lr").values()] == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])
    assert trainer.state_dict()["hooks"]["LRScheduler"]["last_epoch"] == 5


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # there is no model to step
def test_lr_hook_starts_where_training_starts() -> None:
    model = Model()
    optimizer = torch.optim.SGD([{"params": model.parameters(), "initial_lr": 1.0}], lr=1.0)
    trainer = Trainer()
    trainer.register_hooks([hooks.LRScheduler(optimizer, LinearParamScheduler(1.0, 0.0))])
    trainer.train(6, 8)
    assert [v for v, _ in trainer.storage.history("lr").values()] == pytest.approx([1 - 6 / 8, 1 - 7 / 8])


def test_the_rate_worth_showing() -> None:
    def best(sizes: list[int], rates: list[float]) -> int:
        groups = [{"params": [nn.Parameter(torch.zeros(1)) for _ in range(n)], "lr": lr} for n, lr in zip(sizes, rates)]
        return hooks.LRScheduler.get_best_param_group_id(torch.optim.SGD(groups, lr=1))

    assert best([1, 3, 2], [1, 2, 3]) == 1
    assert best([1, 1, 1], [1, 2, 2]) == 1


def test_lr_multiplier_keeps_base_rates_and_position() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=4.0)
    scheduler = LRMultiplier(optimizer, LinearParamScheduler(1.0, 0.0), 8)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0)
    assert scheduler.state_dict() == {"base_lrs": [4.0], "last_epoch": 4}
    with pytest.raises(ValueError, match="ParamScheduler"):
        LRMultiplier(optimizer, lambda _: 1.0, 8)


def test_command_line() -> None:
    args = default_argument_parser().parse_args(["--config-file", "x.yaml", "--num-gpus", "2", "SEED", "3"])
    assert (args.config_file, args.num_gpus, args.opts) == ("x.yaml", 2, ["SEED", "3"])
    assert (args.resume, args.eval_only, args.num_machines, args.machine_rank) == (False, False, 1, 0)
    assert args.dist_url.startswith("tcp://127.0.0.1:")
