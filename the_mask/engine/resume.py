"""Content of checkpoints, and loading them so that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detectron2.engine import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from the_mask.config.compose import flat_keys
from the_mask.config.strict_yaml import parse_yaml
from the_mask.data.class_names import config_classes, describe_difference, same_classes
from the_mask.engine.ema import ExponentialMovingAverage
from the_mask.engine.hooks import EvalHook
from the_mask.engine.optimizer import load_optimizer_state, optimizer_state
from the_mask.engine.rng import rng_state, seed_everything, set_rng_state
from the_mask.engine.writers import WINDOW
from the_mask.weights.checkpoint import BEST, read_checkpoint
from the_mask.weights.class_sets import STORED, stored_classes
from the_mask.weights.loading import compare
from the_mask.weights.sharding import load_whole

if TYPE_CHECKING:
    from the_mask.engine.trainer import Trainer

logger = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class Each:
    """Schema of a list or dictionary: a minimum number of items, each with the same schema."""

    kind: type
    item: Any
    least: int = 0


@dataclass(frozen=True)
class Maybe:
    """Schema of a value that may be absent or None."""

    value: Any


# Schema of a checkpoint for resuming: a type, a dictionary of keys, :class:`Each` or :class:`Maybe`.
TRAINING: dict[str, Any] = {
    "model": Each(dict, Tensor),
    "iteration": int,
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
            "python": {"version": int, "words": Each(list, int), "gauss": Maybe(float)},
            "numpy": {"kind": str, "keys": Tensor, "position": int, "has_gauss": int, "cached": float},
            "torch": Tensor,
        },
        least=1,
    ),
    "ema": Maybe({"updates": int, "average": Each(dict, Tensor)}),
    "scalars": Maybe(Each(dict, {"smooth": bool, "values": Each(list, Each(list, (int, float), least=2))})),
}
BEST_RESULT: dict[str, Any] = {"run": str, "iteration": int, "metrics": Each(dict, float)}


def check_schema(value: Any, schema: Any, path: Path, key: str = "") -> None:
    """Raise a ValueError that names file and key unless a value matches a schema."""
    if isinstance(schema, Maybe):
        if value is not None:
            check_schema(value, schema.value, path, key)
    elif isinstance(schema, dict):
        check_schema(value, dict, path, key)
        for name, part in schema.items():
            check_schema(value.get(name), part, path, f"{key}.{name}" if key else name)
    elif isinstance(schema, Each):
        check_schema(value, (list, tuple) if schema.kind is list else schema.kind, path, key)
        if len(value) < schema.least:
            raise ValueError(f"{path} is no checkpoint of a training: {key!r} has {len(value)} items")
        for name, item in value.items() if schema.kind is dict else enumerate(value):
            check_schema(item, schema.item, path, f"{key}.{name}")
    elif not isinstance(value, schema) or (isinstance(value, bool) and schema is int):
        kinds = schema if isinstance(schema, tuple) else (schema,)
        found = "absent" if value is None else f"a {type(value).__name__}"
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{path} is no checkpoint of a training: {key!r} is {found}, expected {wanted}")


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
    check_schema(state, TRAINING, path)
    _load_model(trainer.model, state["model"], path)
    _check_classes(trainer, state, path)
    try:
        load_optimizer_state(trainer.optimizer, state["trainer"]["optimizer"])
    except ValueError as error:
        raise ValueError(f"{path} cannot be resumed: {error}") from error
    if trainer.scaler.is_enabled() and state["trainer"]["scaler"]:
        trainer.scaler.load_state_dict(state["trainer"]["scaler"])
    _load_ema(trainer, state)
    TrainerBase.load_state_dict(trainer, {"iteration": state["iteration"], "hooks": state["trainer"]["hooks"]})
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


def _load_ema(trainer: Trainer, state: dict[str, Any]) -> None:
    if trainer.ema is None:
        return
    if "ema" in state:
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
        check_schema(best, BEST_RESULT, path)
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
