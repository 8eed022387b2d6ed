"""Checkpoints whose values are wrong, as fuzzing has found them: one line with the file, before the first iteration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fakes import fake_cfg, variant

CHECKPOINT = "model_0000001.pth"


def cfg(folder: Path) -> Any:
    return fake_cfg(folder, "SOLVER.MAX_ITER", 4, "SOLVER.EMA.ENABLED", True, "SOLVER.CHECKPOINT_PERIOD", 2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    variant(noise=0.1)(cfg(folder)).train()
    return torch.load(folder / CHECKPOINT, weights_only=True)


def first(mapping: dict[str, Any]) -> str:
    return next(iter(mapping))


def eval_hook(state: dict[str, Any]) -> dict[str, Any]:
    return state["trainer"]["hooks"]["EvalHook"]


def optimizer(state: dict[str, Any]) -> dict[str, Any]:
    states = state["trainer"]["optimizer"]["state"]
    return states[first(states)]


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a position beyond NumPy's memory": (lambda s: s["rng"][0]["numpy"].update(position=10**6), "position"),
    "a negative position": (lambda s: s["rng"][0]["numpy"].update(position=-1), "position"),
    "another generator": (lambda s: s["rng"][0]["numpy"].update(kind="PCG64"), "random generator"),
    "too few words": (lambda s: s["rng"][0]["python"]["words"].pop(), "random generator"),
    "a word of 65 bits": (lambda s: s["rng"][0]["python"]["words"].__setitem__(0, 2**64), "words.0"),
    "an empty state": (lambda s: s["rng"][0].update(torch=torch.zeros(0, dtype=torch.uint8)), "random generator"),
    "no metric": (lambda s: eval_hook(s).pop("metric"), "'metric' is absent"),
    "a best value of text": (lambda s: eval_hook(s).update(best="x"), "'best' is a str"),
    "an average without a weight": (lambda s: s["ema"]["average"].pop("head.weight"), "averaged weights.*head.weight"),
    "an average of another shape": (lambda s: s["ema"]["average"].update({"head.bias": torch.zeros(7)}), "head.bias"),
    "a moment that is a list": (
        lambda s: optimizer(s).update({first(optimizer(s)): [1]}),
        "optimiser state is damaged",
    ),
    "a moment of another shape": (lambda s: optimizer(s).update(exp_avg=torch.zeros(1, 2, 3)), "optimiser state"),
    "a moment that is a number": (
        lambda s: optimizer(s).update({first(optimizer(s)): 0.5}),
        "optimiser state is damaged",
    ),
    "a missing moment": (lambda s: optimizer(s).pop("exp_avg"), "optimiser state is damaged: 'exp_avg'"),
    "an iteration before the first": (lambda s: s.update(iteration=-7), "'iteration' is -7"),
    "a scalar of three": (lambda s: next(iter(s["scalars"].values()))["values"][0].append(1), "has 3 items"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_wrong_values_are_named(tmp_path: Path, whole: dict[str, Any], kind: str) -> None:
    damage, message = DAMAGE[kind]
    torch.save(whole, tmp_path / CHECKPOINT)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    damage(state)
    torch.save(state, tmp_path / CHECKPOINT)
    trainer = variant(noise=0.1)(cfg(tmp_path))
    with pytest.raises(ValueError, match=rf"{CHECKPOINT}.*{message}"):
        trainer.resume_or_load(resume=True)


def test_the_whole_one_is_taken(tmp_path: Path, whole: dict[str, Any]) -> None:
    torch.save(whole, tmp_path / CHECKPOINT)
    trainer = variant(noise=0.1)(cfg(tmp_path))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
