"""Average the weights of several checkpoints of one model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from the_mask.data.class_names import describe_difference, same_classes
from the_mask.weights.checkpoint import save_checkpoint
from the_mask.weights.class_sets import STORED
from the_mask.weights.reading import read_weights

logger = logging.getLogger(__name__)


def average_state_dicts(
    states: Sequence[dict[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Weighted mean of state dicts with the same names and shapes.

    Floating-point tensors are summed in float64 and keep their dtype. Integers
    (counters such as ``num_batches_tracked``) are taken from the last state.

    Raises:
        ValueError: no states, weights of another number or with sum 0, or states that differ in a name or shape.
    """
    if not states:
        raise ValueError("the average of no checkpoints")
    factors = list(weights) if weights else [1.0] * len(states)
    if len(factors) != len(states) or min(factors) < 0 or sum(factors) <= 0:
        raise ValueError(f"weights {factors} for {len(states)} checkpoints: expected one number >= 0 each, not all 0")
    names = set(states[0])
    for number, state in enumerate(states[1:], 2):
        different = sorted(names ^ set(state))
        different += [name for name in names & set(state) if state[name].shape != states[0][name].shape]
        if different:
            raise ValueError(
                f"checkpoints 1 and {number} are of different models: {len(different)} tensors are in one only or "
                f"differ in shape, e.g. {', '.join(different[:4])}"
            )
    result = {}
    for name, last in states[-1].items():
        if not last.is_floating_point():
            result[name] = last.clone()
            continue
        total = torch.zeros(last.shape, dtype=torch.float64)
        for state, factor in zip(states, factors, strict=True):
            total.add_(state[name].double(), alpha=factor / sum(factors))
        result[name] = total.to(last.dtype)
    return result


def average_checkpoints(
    files: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    trust_pickle: bool = False,
    use_ema: bool = True,
) -> dict[str, Any]:
    """Write the mean weights of checkpoints to ``output``, as a checkpoint for ``MODEL.WEIGHTS``.

    Args:
        files: weights files in any layout that ``load_weights`` reads without renaming.
        output: the file to write.
        weights: one per file; None averages evenly.
        trust_pickle, use_ema: of :func:`the_mask.weights.load_weights`.

    Returns:
        What was written: ``model``, ``averaged`` (the files and their weights), and ``class_names`` if a file has them.

    Raises:
        FileNotFoundError, ValueError: see :func:`average_state_dicts` and ``load_weights``; or files with different
            classes.
    """
    states = []
    named: tuple[str | Path, tuple[str, ...]] | None = None
    for file in files:
        found = read_weights(file, trust_pickle, use_ema)
        logger.info("%s: %d tensors%s", file, len(found.state), "".join(f"; {note}" for note in found.notes))
        states.append(found.state)
        if found.class_names is None:
            continue
        if named is not None and not same_classes(named[1], found.class_names):
            raise ValueError(
                f"{named[0]} and {file} were trained for different classes: "
                f"{describe_difference(named[1], found.class_names, str(named[0]))}"
            )
        named = named or (file, found.class_names)
    content = {
        **({STORED: list(named[1])} if named is not None else {}),
        "model": average_state_dicts(states, weights),
        "averaged": [[str(file), float(w)] for file, w in zip(files, weights or [1.0] * len(states), strict=True)],
    }
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(output, content)
    return content
