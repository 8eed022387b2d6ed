"""The training loop on a model of a few dozen parameters."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from engine_fakes import (
    FakeModel,
    FakeTrainer,
    assert_same,
    fake_cfg,
    fake_clip,
    hooked,
    variant,
    weights,
)
from tolerances import approx, is_close

from the_mask.engine import Trainer, TrainingInterrupted
from the_mask.engine.output_lock import OutputInUseError, claimed
from the_mask.weights import CheckpointWriteError, read_checkpoint
from the_mask.weights import checkpoint as checkpoint_module

NOISY = {"dropout": 0.3, "noise": 0.1}


def trained(trainer: Trainer) -> Trainer:
    trainer.train()
    return trainer


def resumed(cfg: CfgNode, kind: type[Trainer] = FakeTrainer) -> Trainer:
    trainer = kind(cfg)
    trainer.resume_or_load(True)
    return trainer


def test_equals_a_plain_loop(tmp_path: Path) -> None:
    """Oracle: a hand-written loop with torch's own AdamW, clipping and poly schedule."""
    cfg = fake_cfg(tmp_path)
    trainer = FakeTrainer(cfg)
    model = FakeModel()
    model.load_state_dict(trainer.model.state_dict())
    trainer.train()
    groups = [
        {"params": model.backbone.parameters(), "lr": 0.1},
        {"params": model.norm.parameters(), "lr": 1.0, "weight_decay": 0.0},
        {"params": model.head.parameters(), "lr": 1.0},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=cfg.SOLVER.WEIGHT_DECAY)
    for iteration in range(6):
        for group, factor in zip(optimizer.param_groups, (0.1, 1.0, 1.0), strict=True):
            group["lr"] = 0.05 * factor * (1 - iteration / 6) ** 0.9
        optimizer.zero_grad()
        sum(model([fake_clip(p) for p in range(4 * iteration, 4 * iteration + 4)]).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name, value in model.state_dict().items():
        assert is_close(value, trainer.model.state_dict()[name], "sum"), name
    assert trainer.model.iterations == list(range(6))


def test_accumulation_equals_a_big_batch(tmp_path: Path) -> None:
    """Equal because the fake loss is a mean over clips; a term with its own normaliser would be a mean of means."""
    # Neither clipping nor AdamW may hide a wrong scale of the gradient.
    plain = ["SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 0.01, "SOLVER.CLIP_GRADIENTS.ENABLED", False]
    one = trained(FakeTrainer(fake_cfg(tmp_path / "one", *plain)))
    four = trained(FakeTrainer(fake_cfg(tmp_path / "four", *plain, "SOLVER.ACCUM_STEPS", 4)))
    for name, value in weights(one).items():
        if name != "count":
            assert is_close(value, weights(four)[name], "sum"), name
    losses = [
        [json.loads(line)["total_loss"] for line in (tmp_path / run / "metrics.json").read_text().splitlines()]
        for run in ("one", "four")
    ]
    assert losses[0] == approx(losses[1], "formula")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_on_the_cpu(tmp_path: Path, precision: str) -> None:
    # AdamW would hide a gradient that is still multiplied by the scale of fp16.
    plain = ["SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 0.02]
    full = trained(FakeTrainer(fake_cfg(tmp_path / "full", *plain)))
    overrides = [*plain, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", precision]
    seen = []

    class Spy(FakeTrainer):
        @classmethod
        def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
            model = FakeTrainer.build_model(cfg)
            model.backbone.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
            return model

    half = Spy(fake_cfg(tmp_path / "half", *overrides))
    start = weights(half)
    if precision == "fp16":
        half.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)  # small enough that no step is skipped
    half.train()
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert half.model.head.weight.dtype == torch.float32
    assert half.scaler.is_enabled() == (precision == "fp16")
    for name, value in weights(full).items():
        assert torch.allclose(value.float(), weights(half)[name].float(), atol=0.01), name
    assert (weights(full)["head.weight"] - start["head.weight"]).abs().max() > 0.05


def test_fp16_overflow_skips_the_step_and_goes_on(tmp_path: Path) -> None:
    cfg = fake_cfg(tmp_path, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "fp16")
    trainer = FakeTrainer(cfg)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = weights(trainer)
    after_first = []
    trainer.register_hooks([hooked(lambda t: after_first.append(weights(t)), 0, "after_step")])
    trainer.train()
    assert torch.equal(before["head.weight"], after_first[0]["head.weight"])
    assert trainer.scaler.get_scale() < 2.0**40


def test_ema_is_what_gets_evaluated(tmp_path: Path) -> None:
    seen = {}

    class Spy(FakeTrainer):
        @classmethod
        def evaluate_model(cls, cfg: CfgNode, model: torch.nn.Module) -> dict:
            seen["evaluated"] = model.head.weight.detach().clone()
            return {}

    trainer = Spy(fake_cfg(tmp_path, "SOLVER.EMA.ENABLED", True, "TEST.EVAL_PERIOD", 6))
    start = weights(trainer)["head.weight"]
    path = [start]
    trainer.register_hooks([hooked(lambda t: None, 99)])
    original = trainer.ema.update

    def update(model: torch.nn.Module) -> None:
        path.append(model.head.weight.detach().clone())
        original(model)

    trainer.ema.update = update
    trainer.train()
    expected = start.double()
    for n, value in enumerate(path[1:]):
        d = min(0.9998, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * value.double()
    assert is_close(seen["evaluated"], expected, "sum")
    assert torch.equal(trainer.model.head.weight, path[-1])
    saved = read_checkpoint(tmp_path / "model_final.pth")
    assert torch.equal(saved["model"]["head.weight"], path[-1])
    assert torch.equal(saved["ema"]["average"]["head.weight"], seen["evaluated"])


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("variant_of", ["adamw", "sgd", "fp16", "accumulated"])
def test_resumed_equals_uninterrupted(tmp_path: Path, variant_of: str, ema: bool) -> None:
    overrides = {
        "adamw": [],
        "sgd": ["SOLVER.OPTIMIZER", "SGD"],
        "fp16": ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "fp16"],
        "accumulated": ["SOLVER.ACCUM_STEPS", 2],
    }[variant_of]
    overrides += ["SOLVER.EMA.ENABLED", ema, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 3]
    kind = variant(**NOISY)
    whole = trained(kind(fake_cfg(tmp_path / "whole", *overrides)))

    def die(trainer: Trainer) -> None:
        raise SystemExit

    cfg = fake_cfg(tmp_path / "parts", *overrides)
    first = kind(cfg)
    first._rescue = lambda error: None  # as if killed
    first.register_hooks([hooked(die, 4)])
    with pytest.raises(SystemExit):
        first.train()
    torch.manual_seed(99)  # a new process starts with other generators
    second = trained(resumed(cfg, kind))
    assert second.start_iter == 3
    states = [read_checkpoint(tmp_path / run / "model_final.pth") for run in ("whole", "parts")]
    for state in states:
        del state["config"], state["run"], state["numbered"]
        del state["scalars"]["time"], state["scalars"]["data_time"]
    # As text, since a norm that is not a number equals no other.
    assert str(states[0].pop("scalars")) == str(states[1].pop("scalars"))
    assert_same(*states)
    assert_same(weights(whole), weights(second))
    whole_curves, curves = curves_of(tmp_path / "whole"), curves_of(tmp_path / "parts")
    assert [row["iteration"] for row in curves] == list(range(6))
    assert str(curves) == str(whole_curves)


def curves_of(folder: Path) -> list[dict]:
    """Lines of ``metrics.json`` without the times, which are never the same."""
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("time", "data_time")} for row in rows]


@pytest.mark.parametrize("log_period", [1, 2, 3])
@pytest.mark.parametrize("killed", [1, 2, 3])
def test_an_evaluation_that_was_killed_is_repeated(tmp_path: Path, killed: int, log_period: int) -> None:
    """Curves, best checkpoint and results are those of an uninterrupted run, whichever evaluation was killed."""
    overrides = ["TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.LOG_PERIOD", log_period]
    whole = trained(variant(**NOISY)(fake_cfg(tmp_path / "whole", *overrides)))
    cfg = fake_cfg(tmp_path / "parts", *overrides)
    calls: list[int] = []

    class Killed(variant(**NOISY)):
        @classmethod
        def evaluate_model(cls, cfg: CfgNode, model: torch.nn.Module) -> dict:
            calls.append(1)
            if len(calls) == killed:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().evaluate_model(cfg, model)

    child = os.fork()
    if child == 0:
        try:
            Killed(cfg).train()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    second = resumed(cfg, variant(**NOISY))
    assert second.completed == 2 * killed
    second.train()
    assert curves_of(tmp_path / "parts") == curves_of(tmp_path / "whole")
    assert str(second.results) == str(whole.results)
    assert_same(*(read_checkpoint(tmp_path / run / "model_best.pth")["model"] for run in ("whole", "parts")))
    # Once it is in the curves it is not repeated.
    before = (tmp_path / "parts" / "metrics.json").read_text()
    resumed(cfg, variant(**NOISY)).train()
    assert curves_of(tmp_path / "parts") == curves_of(tmp_path / "whole")
    assert len(before.splitlines()) == len((tmp_path / "parts" / "metrics.json").read_text().splitlines())


def test_an_evaluation_that_was_finished_is_not_repeated(tmp_path: Path) -> None:
    overrides = ["TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 2]
    cfg = fake_cfg(tmp_path, *overrides)
    first = FakeTrainer(cfg)
    first._rescue = lambda error: None  # as if killed
    first.register_hooks([hooked(lambda t: (_ for _ in ()).throw(SystemExit), 4)])
    with pytest.raises(SystemExit):
        first.train()
    calls: list[int] = []

    class Counting(FakeTrainer):
        @classmethod
        def evaluate_model(cls, cfg: CfgNode, model: torch.nn.Module) -> dict:
            calls.append(1)
            return super().evaluate_model(cfg, model)

    second = resumed(cfg, Counting)
    assert second.completed == 4
    second.train()
    assert len(calls) == 1  # that of iteration 6


def test_resume_needs_the_generators(tmp_path: Path) -> None:
    """The test above would pass without them if the fake model drew nothing."""
    kind = variant(**NOISY)
    cfg = fake_cfg(tmp_path, "SOLVER.CHECKPOINT_PERIOD", 3)
    whole = trained(kind(cfg))
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    second = resumed(cfg, kind)
    second._resumed_rng = None
    second.train()
    assert not torch.equal(whole.model.head.weight, second.model.head.weight)


def test_longer_training_and_new_learning_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(FakeTrainer(fake_cfg(tmp_path)))
    cfg = fake_cfg(tmp_path, "SOLVER.MAX_ITER", 12, "SOLVER.BASE_LR", 0.01)
    with caplog.at_level("WARNING", logger="the_mask"):
        trainer = resumed(cfg)
    assert "SOLVER.MAX_ITER: 6 -> 12" in caplog.text
    assert "SOLVER.BASE_LR: 0.05 -> 0.01" in caplog.text
    rates = []
    trainer.register_hooks([hooked(lambda t: rates.append(t.optimizer.param_groups[-1]["lr"]), 6, "after_step")])
    trainer.train()
    assert trainer.start_iter == 6
    assert rates == [pytest.approx(0.01 * 0.5**0.9)]


@pytest.mark.parametrize(("period", "expected"), [(-1, []), (0, [6]), (4, [4, 6])])
def test_period_of_evaluations(tmp_path: Path, period: int, expected: list[int]) -> None:
    at: list[int] = []

    class Counted(FakeTrainer):
        def evaluate(self) -> dict:
            at.append(self.iter + 1)
            return super().evaluate()

    trained(Counted(fake_cfg(tmp_path, "TEST.EVAL_PERIOD", period)))
    assert at == expected


def test_nothing_left_to_train_still_evaluates(tmp_path: Path) -> None:
    cfg = fake_cfg(tmp_path, "TEST.EVAL_PERIOD", 3)
    first = trained(FakeTrainer(cfg))
    second = resumed(cfg)
    assert second.train()["sem_seg"]["mIoU"] == first.results["sem_seg"]["mIoU"]
    assert_same(weights(first), weights(second))


def test_resume_without_a_checkpoint_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="the_mask"):
        trainer = resumed(fake_cfg(tmp_path))
    assert "no checkpoint in" in caplog.text
    assert trained(trainer).completed == 6


def test_drawn_seed_is_resumed(tmp_path: Path) -> None:
    cfg = fake_cfg(tmp_path, "SEED", -1, "SOLVER.CHECKPOINT_PERIOD", 3)
    first = trained(FakeTrainer(cfg))
    assert first.cfg.SEED >= 0
    assert resumed(cfg).cfg.SEED == first.cfg.SEED
    assert FakeTrainer(cfg).cfg.SEED != first.cfg.SEED


def test_same_seed_same_run(tmp_path: Path) -> None:
    kind = variant(**NOISY)
    runs = [weights(trained(kind(fake_cfg(tmp_path / name)))) for name in "ab"]
    assert_same(*runs)
    other = weights(trained(kind(fake_cfg(tmp_path / "c", "SEED", 8))))
    assert not torch.equal(runs[0]["head.weight"], other["head.weight"])


def test_evaluation_leaves_no_trace(tmp_path: Path) -> None:
    kind = variant(**NOISY)
    without = trained(kind(fake_cfg(tmp_path / "without")))
    with_it = trained(kind(fake_cfg(tmp_path / "with", "TEST.EVAL_PERIOD", 1)))
    assert_same(weights(without), weights(with_it))
    assert with_it.model.training


def test_best_checkpoint(tmp_path: Path) -> None:
    scores = iter([1.0, 3.0, 2.0])

    class Scored(FakeTrainer):
        @classmethod
        def evaluate_model(cls, cfg: CfgNode, model: torch.nn.Module) -> dict:
            return {"sem_seg": {"mIoU": next(scores), "VC8": 9.0}}

    cfg = fake_cfg(tmp_path, "TEST.EVAL_PERIOD", 2)
    trained(Scored(cfg))
    best = read_checkpoint(tmp_path / "model_best.pth")
    assert best["iteration"] == 3
    assert best["metrics"] == {"sem_seg/mIoU": 3.0, "sem_seg/VC8": 9.0}
    assert "trainer" not in best

    scores = iter([4.0])
    trained(resumed(fake_cfg(tmp_path, "TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 8), Scored))
    assert read_checkpoint(tmp_path / "model_best.pth")["iteration"] == 7
    # A longer run that reaches less keeps the best, although the final checkpoint was written before that was known.
    scores = iter([3.5])
    trained(resumed(fake_cfg(tmp_path, "TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 10), Scored))
    assert read_checkpoint(tmp_path / "model_best.pth")["iteration"] == 7
    # A fresh run in the same folder starts its own record, also after a resume.
    first = Scored(cfg)
    first.register_hooks([hooked(lambda t: os.kill(os.getpid(), signal.SIGINT), 0)])
    with pytest.raises(TrainingInterrupted):
        first.train()
    scores = iter([0.5, 0.4, 0.3])
    trained(resumed(cfg, Scored))
    assert read_checkpoint(tmp_path / "model_best.pth")["iteration"] == 1


def test_unknown_best_metric_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="the_mask"):
        trained(FakeTrainer(fake_cfg(tmp_path, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_BEST", "AP")))
    assert caplog.text.count("CHECKPOINT_BEST AP is not among the results") == 1
    assert not (tmp_path / "model_best.pth").exists()


def test_non_finite_loss_names_the_files(tmp_path: Path) -> None:
    trainer = variant(bad_position=14)(fake_cfg(tmp_path, "SOLVER.ACCUM_STEPS", 2))
    before = []
    trainer.register_hooks([hooked(lambda t: before.append(weights(t)), 3)])
    with pytest.raises(FloatingPointError) as info:
        trainer.train()
    text = str(info.value)
    assert "iteration 3" in text
    assert "loss_square = nan" in text
    for number in (12, 13, 14, 15):
        assert f"video/{number:03d}.jpg" in text
    assert_same(
        {k: v for k, v in before[0].items() if k != "count"},
        {k: v for k, v in weights(trainer).items() if k != "count"},
    )
    # What was learned before is kept.
    left = read_checkpoint(trainer.checkpoints.last())
    assert left["iteration"] == 2
    assert_same(left["model"]["head.weight"], before[0]["head.weight"])


def test_non_finite_gradient_is_found_too(tmp_path: Path) -> None:
    trainer = FakeTrainer(fake_cfg(tmp_path))
    trainer.register_hooks([hooked(lambda t: t.model.head.bias.grad.fill_(float("inf")), 2, "after_backward")])
    with pytest.raises(FloatingPointError, match=r"iteration 2, before the optimiser step: gradient norm = "):
        trainer.train()
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())


def test_failed_step_leaves_a_checkpoint_that_resumes_exactly(tmp_path: Path) -> None:
    """The failed iteration drew random numbers; the checkpoint has the generators as they were before it."""
    whole = weights(trained(variant(**NOISY)(fake_cfg(tmp_path / "whole"))))
    cfg = fake_cfg(tmp_path / "parts")
    with pytest.raises(FloatingPointError):
        variant(**NOISY, bad_position=18)(cfg).train()
    second = weights(trained(resumed(cfg, variant(**NOISY))))
    assert_same(whole, second)


def test_no_iteration_is_written_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = FakeTrainer(fake_cfg(tmp_path, "SOLVER.CHECKPOINT_PERIOD", 3))
    trainer.register_hooks([hooked(lambda t: os.kill(os.getpid(), signal.SIGINT), 2)])
    with caplog.at_level("INFO", logger="the_mask"), pytest.raises(TrainingInterrupted):
        trainer.train()
    assert caplog.text.count("checkpoint of iteration 3 written") == 1


def test_broken_data_leaves_a_checkpoint_that_resumes_exactly(tmp_path: Path) -> None:
    """The generators are saved as they were before the failed iteration."""
    whole = trained(variant(**NOISY)(fake_cfg(tmp_path / "whole")))
    cfg = fake_cfg(tmp_path / "parts")
    with pytest.raises(ValueError, match=r"video/018.jpg is truncated"):
        variant(**NOISY, broken_position=18)(cfg).train()
    second = resumed(cfg, variant(**NOISY))
    assert second.completed == 4
    assert_same(weights(whole), weights(trained(second)))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_a_checkpoint(tmp_path: Path, signum: int) -> None:
    whole = trained(variant(**NOISY)(fake_cfg(tmp_path / "whole")))
    cfg = fake_cfg(tmp_path / "parts")
    trainer = variant(**NOISY)(cfg)
    trainer.register_hooks([hooked(lambda t: os.kill(os.getpid(), signum), 2)])
    handlers = signal.getsignal(signum)
    with pytest.raises(TrainingInterrupted) as info:
        trainer.train()
    assert info.value.exit_code == 128 + signum
    assert signal.getsignal(signum) == handlers
    assert trainer.completed == 3
    assert (tmp_path / "parts" / "model_0000002.pth").exists()
    # The curve was written up to there.
    rows = [json.loads(line) for line in (tmp_path / "parts" / "metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert_same(weights(whole), weights(trained(resumed(cfg, variant(**NOISY)))))


def test_ctrl_c_during_an_evaluation_stops_at_once(tmp_path: Path) -> None:
    class Long(FakeTrainer):
        @classmethod
        def evaluate_model(cls, cfg: CfgNode, model: torch.nn.Module) -> dict:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the evaluation went on")

    trainer = Long(fake_cfg(tmp_path, "TEST.EVAL_PERIOD", 2, "SOLVER.EMA.ENABLED", True))
    with pytest.raises(TrainingInterrupted):
        trainer.train()
    left = read_checkpoint(trainer.checkpoints.last())
    assert left["iteration"] == 1
    assert_same(left["model"], weights(trainer))
    assert trainer.model.training


def test_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("the_mask.engine.signals._ECHO_SECONDS", -1.0)

    def twice(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    trainer = FakeTrainer(fake_cfg(tmp_path))
    trainer.register_hooks([hooked(twice, 4)])
    with pytest.raises(TrainingInterrupted):
        trainer.train()
    assert read_checkpoint(trainer.checkpoints.last())["iteration"] == 3


def test_worker_killed_by_the_same_ctrl_c(tmp_path: Path) -> None:
    """A data worker that dies of Ctrl-C surfaces as an error of the loader; the user sees an interruption."""

    def interrupted(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("DataLoader worker exited unexpectedly")

    trainer = FakeTrainer(fake_cfg(tmp_path))
    trainer.register_hooks([hooked(interrupted, 2)])
    with pytest.raises(TrainingInterrupted):
        trainer.train()
    assert read_checkpoint(trainer.checkpoints.last())["iteration"] == 1


def test_full_disk_while_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = FakeTrainer(fake_cfg(tmp_path, "SOLVER.CHECKPOINT_PERIOD", 2))

    def full(state: object, stream: object) -> None:
        raise OSError(28, "No space left on device")

    trainer.register_hooks([hooked(lambda t: monkeypatch.setattr(checkpoint_module.torch, "save", full), 2)])
    with pytest.raises(CheckpointWriteError, match=r"model_0000003.pth.*No space left on device.*--resume"):
        trainer.train()
    monkeypatch.undo()
    last = trainer.checkpoints.last()
    assert last is not None
    assert read_checkpoint(last)["iteration"] == 1
    assert resumed(fake_cfg(tmp_path)).completed == 2


def test_corrupt_checkpoint_on_resume(tmp_path: Path) -> None:
    cfg = fake_cfg(tmp_path, "SOLVER.CHECKPOINT_PERIOD", 2)
    trained(FakeTrainer(cfg))
    last = tmp_path / "model_final.pth"
    last.write_bytes(last.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"model_final.pth cannot be read.*Next best.*model_000000"):
        resumed(cfg)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    assert resumed(cfg).completed == 4


def test_resume_with_another_model(tmp_path: Path) -> None:
    class Wide(FakeTrainer):
        @classmethod
        def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
            model = FakeModel()
            model.head = torch.nn.Linear(8, 2)
            return model

    trained(FakeTrainer(fake_cfg(tmp_path)))
    with pytest.raises(ValueError, match=r"(?s)written for another model.*head.weight: file \[1, 8\], model \[2, 8\]"):
        resumed(fake_cfg(tmp_path), Wide)


def test_resume_from_weights_only(tmp_path: Path) -> None:
    cfg = fake_cfg(tmp_path, "TEST.EVAL_PERIOD", 3)
    trained(FakeTrainer(cfg))
    (tmp_path / "last_checkpoint").write_text("model_best.pth")
    with pytest.raises(ValueError, match="holds weights only"):
        resumed(cfg)


def test_start_from_weights(tmp_path: Path) -> None:
    first = trained(FakeTrainer(fake_cfg(tmp_path / "first", "TEST.EVAL_PERIOD", 3)))
    path = str(tmp_path / "first" / "model_final.pth")
    second = FakeTrainer(fake_cfg(tmp_path / "second", "MODEL.WEIGHTS", path, "SOLVER.EMA.ENABLED", True))
    second.resume_or_load(False)
    assert second.completed == 0
    assert torch.equal(second.model.head.weight, first.model.head.weight)
    assert torch.equal(second.ema.average["head.weight"], first.model.head.weight)


def test_criterion_statistics_are_logged(tmp_path: Path) -> None:
    class Counting(FakeTrainer):
        @classmethod
        def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
            model = FakeModel()
            model.criterion = torch.nn.Module()
            model.criterion.last_stats = {"positive_all": 0.25, "mode": "primary", "videos": []}
            return model

    trained(Counting(fake_cfg(tmp_path)))
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [row["criterion/positive_all"] for row in rows] == [0.25] * 6
    assert all({"lr", "time", "data_time", "grad_norm", "total_loss", "loss_square"} <= row.keys() for row in rows)


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".model_0000009.pth.123.writing").write_bytes(b"half")
    trained(FakeTrainer(fake_cfg(tmp_path)))
    assert not list(tmp_path.glob(".*writing"))


def test_two_trainings_cannot_share_a_folder(tmp_path: Path) -> None:
    """The other one is a process of its own; when it is killed, the folder is free at once."""
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with claimed(tmp_path):
                os.write(ready[1], b"x")
                os.read(go[0], 1)
        finally:
            os._exit(0)
    os.close(ready[1])
    assert os.read(ready[0], 1)
    cfg = fake_cfg(tmp_path)
    with pytest.raises(
        OutputInUseError, match=rf"in use by another training \(process {child} on .*another OUTPUT_DIR"
    ):
        FakeTrainer(cfg).train()
    assert not (tmp_path / "model_final.pth").exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for end in (ready[0], *go):
        os.close(end)
    assert trained(FakeTrainer(cfg)).completed == 6
    with claimed(tmp_path), claimed(tmp_path):
        pass


def remove(folder: Path) -> None:
    """Delete a folder that other threads still write to."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def test_a_folder_that_is_deleted_during_the_run_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    trainer = FakeTrainer(fake_cfg(folder, "SOLVER.CHECKPOINT_PERIOD", 2))
    trainer.register_hooks([hooked(lambda t: remove(folder), 3)])
    with caplog.at_level("WARNING", logger="the_mask"):
        trained(trainer)
    assert "was emptied or deleted during the run" in caplog.text
    assert "metrics.json was deleted during the run: a new one is begun" in caplog.text
    assert [row["iteration"] for row in curves_of(folder)] == [3, 4, 5]
    assert read_checkpoint(folder / "model_final.pth")["iteration"] == 5


def test_damaged_lines_of_metrics_are_dropped(tmp_path: Path) -> None:
    cfg = fake_cfg(tmp_path, "SOLVER.CHECKPOINT_PERIOD", 3)
    first = FakeTrainer(cfg)
    first._rescue = lambda error: None
    first.register_hooks([hooked(lambda t: (_ for _ in ()).throw(SystemExit), 4)])
    with pytest.raises(SystemExit):
        first.train()
    with open(tmp_path / "metrics.json", "ab") as stream:
        stream.write(b'\xff\xfe\n3\n[]\n{"iteration": "1"}\n{"iteration": null}\n' + b"[" * 5000 + b'\n{"iterat')
    trained(resumed(cfg))
    assert [row["iteration"] for row in curves_of(tmp_path)] == list(range(6))


def _set(state: dict, key: str, value: object) -> None:
    *nodes, leaf = key.split(".")
    for name in nodes:
        state = state[int(name)] if isinstance(state, list) else state[name]
    if value is None:
        del state[leaf]
    else:
        state[leaf] = value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, None) for key in ("run", "iteration", "config", "numbered", "rng", "trainer.seed", "trainer.hooks")),
        *(("iteration", value) for value in ("3", 1.5, True)),
        *(("trainer", value) for value in (3, [], {})),
        *(("numbered", value) for value in ("x", [1], {"a": 1})),
        *(("rng", value) for value in ([], [3], [{}])),
        *(("rng.0.torch", value) for value in (3, "x")),
        *(("trainer.optimizer", value) for value in ({}, {"kind": "AdamW", "state": 3}, {"kind": 1, "state": {}})),
        *(("scalars", value) for value in (3, {"lr": 3}, {"lr": {"smooth": True, "values": [[1.0]]}})),
        *(("model", value) for value in ({"w": 3}, {"w": {}})),
        ("trainer.hooks", {"EvalHook": 3}),
        ("run", 3),
    ],
)
def test_a_checkpoint_of_other_content_is_named(tmp_path: Path, key: str, value: object) -> None:
    cfg = fake_cfg(tmp_path, "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 1)
    trained(FakeTrainer(cfg))
    path = tmp_path / "model_final.pth"
    state = torch.load(path, weights_only=True)
    _set(state, key, value)
    torch.save(state, path)
    with pytest.raises(ValueError, match=rf"model_final.pth is no checkpoint of a training: '{key}"):
        resumed(cfg)
