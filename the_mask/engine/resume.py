"""Content of checkpoints, and loading them so that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detectron2.engine import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from the_mask.config.compose import flat_keys
from the_mask.config.strict_yaml import parse_yaml
from the_mask.data.class_names import config_classes, describe_difference, same_classes
from the_mask.data.schema import Each, Maybe, Number, check_schema
from the_mask.engine.ema import ExponentialMovingAverage
from the_mask.engine.hooks import EvalHook
from the_mask.engine.optimizer import load_optimizer_state, optimizer_state
from the_mask.engine.rng import preserved_rng, rng_state, seed_everything, set_rng_state
from the_mask.engine.writers import WINDOW
from the_mask.weights.checkpoint import BEST, read_checkpoint
from the_mask.weights.class_sets import STORED, stored_classes
from the_mask.weights.loading import compare
from the_mask.weights.sharding import load_whole

if TYPE_CHECKING:
    from the_mask.engine.trainer import Trainer

logger = logging.getLogger(__name__)

FORMAT = 1


# Schema of a checkpoint for resuming.
TRAINING: dict[str, Any] = {
    "model": Each(dict, Tensor),
    "iteration": Number(-1, 2**40),
    "run": str,
    "config": str,
    "numbered": Each(list, str),
    "trainer": {
        "optimizer": {"kind": str, "state": Each(dict, dict)},
        "scaler": dict,
        "hooks": Each(dict, dict),
        "seed": int,
    },
    "rng": Each(
        list,
        {
            "python": {"version": int, "words": Each(list, Number(0, 2**32 - 1)), "gauss": Maybe(float)},
            # NumPy reads beyond its memory at a position that it does not have.
            "numpy": {"kind": str, "keys": Tensor, "position": Number(0, 624), "has_gauss": int, "cached": float},
            "torch": Tensor,
        },
        least=1,
    ),
    "ema": Maybe({"updates": int, "average": Each(dict, Tensor)}),
    "scalars": Maybe(Each(dict, {"smooth": bool, "values": Each(list, Each(list, (int, float), least=2, most=2))})),
}
BEST_RESULT: dict[str, Any] = {"run": str, "iteration": int, "metrics": Each(dict, float)}


def weights_state(trainer: Trainer) -> dict[str, Any]:
    """Weights (and their average), index of the last finished iteration, and config."""
    state: dict[str, Any] = {
        "format": FORMAT,
        "run": trainer.run_id,
        "model": dict(trainer.model.state_dict()),
        "iteration": trainer.completed - 1,
        "config": trainer.cfg.dump(),
    }
    classes = config_classes(trainer.cfg)
    if classes is not None:
        state[STORED] = list(classes)
    if trainer.ema is not None:
        state["ema"] = trainer.ema.state_dict()
    return state


def training_state(trainer: Trainer, rng: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Everything a run needs to continue bit for bit, as tensors and builtins. A collective call.

    Args:
        trainer: trainer between two iterations.
        rng: generator states per rank, if not the current ones.
    """
    return {
        **weights_state(trainer),
        "scalars": scalars_state(getattr(trainer, "storage", None)),
        "trainer": {
            "optimizer": optimizer_state(trainer.optimizer),
            "scaler": trainer.scaler.state_dict(),
            "hooks": TrainerBase.state_dict(trainer).get("hooks", {}),
            "seed": trainer.cfg.SEED,
        },
        "rng": rng or comm.all_gather(rng_state()),
    }


def scalars_state(storage: EventStorage | None) -> dict[str, Any]:
    """The last values of every scalar by name, whose median is shown in curves: ``[[value, iteration], ...]``."""
    if storage is None:
        return {}
    hints = storage.smoothing_hints()
    return {
        name: {"smooth": hints[name], "values": [[float(v), int(i)] for v, i in history.values()[-WINDOW:]]}
        for name, history in storage.histories().items()
    }


def restore_scalars(storage: EventStorage, scalars: dict[str, Any], start_iter: int) -> None:
    """Restore :func:`scalars_state`, so that medians continue without a break."""
    for name, known in scalars.items():
        for value, iteration in known["values"]:
            storage.iter = iteration
            storage.put_scalar(name, value, smoothing_hint=known["smooth"])
    storage.iter = start_iter


def load(trainer: Trainer, path: Path) -> None:
    """Continue a run from one of its checkpoints.

    Learning rates, decays and the length of the training come from the current config and may differ.

    Raises:
        FileNotFoundError, ValueError: no checkpoint, a damaged one, or one of another training.
    """
    state = read_checkpoint(path)
    if "trainer" not in state:
        raise ValueError(
            f"{path} holds weights only, so it cannot be resumed; use it as MODEL.WEIGHTS without --resume"
        )
    check_schema(state, TRAINING, f"{path} is no checkpoint of a training")
    _load_model(trainer.model, state["model"], path)
    _check_classes(trainer, state, path)
    _check_rng(state["rng"], path)
    try:
        load_optimizer_state(trainer.optimizer, state["trainer"]["optimizer"])
    except ValueError as error:
        raise ValueError(f"{path} cannot be resumed: {error}") from error
    if trainer.scaler.is_enabled() and state["trainer"]["scaler"]:
        trainer.scaler.load_state_dict(state["trainer"]["scaler"])
    _load_ema(trainer, state, path)
    try:
        TrainerBase.load_state_dict(trainer, {"iteration": state["iteration"], "hooks": state["trainer"]["hooks"]})
    except ValueError as error:
        raise ValueError(f"{path} cannot be resumed: {error}") from error
    trainer.completed = trainer._saved = trainer.start_iter = state["iteration"] + 1
    trainer.run_id = state["run"]
    trainer.checkpoints.take_numbered(state["numbered"], path)
    _load_best(trainer)
    _load_seed(trainer, state)
    trainer._resumed_rng = {"rng": state["rng"], "iteration": state["iteration"]}
    trainer._resumed_scalars = state.get("scalars", {})  # absent in older checkpoints
    for difference in config_differences(state["config"], trainer.cfg.dump()):
        logger.warning("the config differs from the checkpoint's: %s", difference)
    logger.info("resuming at iteration %d of %d from %s", trainer.completed, trainer.max_iter, path)


def _load_model(model: nn.Module, weights: dict[str, Any], path: Path) -> None:
    report = compare(weights, model.state_dict(), str(path))
    if report.missing or report.unexpected or report.mismatched or report.dropped:
        raise ValueError(f"{path} was written for another model, so it cannot be resumed\n{report}")
    load_whole(model, weights)


def _check_classes(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    ours, theirs = config_classes(trainer.cfg), stored_classes(state)
    if trainer.cfg.MODEL.CHECK_CLASS_NAMES and ours and theirs and not same_classes(ours, theirs):
        raise ValueError(
            f"{path} was written for other classes, so it cannot be resumed: {describe_difference(ours, theirs)}; use "
            "it as MODEL.WEIGHTS without --resume, which starts the class layers anew"
        )


def _check_rng(states: list[dict[str, Any]], path: Path) -> None:
    """Try the states of the generators, which are put back only when the training starts."""
    try:
        with preserved_rng():
            for state in states[comm.get_rank() :][:1]:
                set_rng_state(state)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} cannot be resumed: the state of a random generator is damaged: {error}") from error


def _load_ema(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    if trainer.ema is None:
        return
    if state.get("ema") is not None:
        saved = state["ema"]["average"]
        strange = [n for n, value in trainer.ema.average.items() if n not in saved or saved[n].shape != value.shape]
        if strange:
            raise ValueError(
                f"{path} cannot be resumed: {len(strange)} averaged weights are missing or have another shape, e.g. "
                f"{strange[0]}"
            )
        trainer.ema.load_state_dict(state["ema"])
    else:
        logger.warning("the checkpoint has no averaged weights: the average starts now")
        trainer.ema = ExponentialMovingAverage(trainer.model, trainer.cfg.SOLVER.EMA.DECAY)


def _load_best(trainer: Trainer) -> None:
    """Load the best result so far: the best checkpoint may be newer than the resumed one; do not overwrite it."""
    path = trainer.checkpoints.folder / BEST
    if not path.is_file():
        return
    try:
        best = read_checkpoint(path)
        check_schema(best, BEST_RESULT, f"{path} is no checkpoint of a training")
    except ValueError as error:
        logger.warning("%s", error)
        return
    for hook in trainer._hooks:
        if isinstance(hook, EvalHook) and best["run"] == trainer.run_id:
            hook.take_best(best["metrics"], best["iteration"] + 1)


def _load_seed(trainer: Trainer, state: dict[str, Any]) -> None:
    if trainer.seed_was_drawn:
        # The order of the data is determined by the seed.
        trainer.cfg.defrost()
        trainer.cfg.SEED = state["trainer"]["seed"]
        trainer.cfg.freeze()


def restore_rng(state: dict[str, Any], seed: int) -> None:
    """Restore this rank's generators; ranks that are not in the checkpoint are seeded anew."""
    states, rank = state["rng"], comm.get_rank()
    if len(states) != comm.get_world_size():
        logger.warning(
            "the checkpoint was written by %d processes, this run has %d: it continues, but not bit for bit",
            len(states),
            comm.get_world_size(),
        )
    if rank < len(states):
        set_rng_state(states[rank])
    else:
        seed_everything(seed + rank + state["iteration"])


def config_differences(old: str, new: str) -> list[str]:
    """``KEY: old -> new`` for each key that differs between two dumped configs."""
    before = dict(flat_keys(parse_yaml(old, "config of the checkpoint")))
    after = dict(flat_keys(parse_yaml(new)))
    absent = "(absent)"
    return [
        f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, absent) != after.get(key, absent)
    ]
