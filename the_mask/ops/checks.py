"""Input checks shared by the operators and called by every path.

Axes: ``L`` levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def to_pair(name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    """``value`` as a (vertical, horizontal) pair of ints, each at least ``minimum``.

    Raises:
        ValueError: wrong length or a number below ``minimum``.
    """
    pair = (value, value) if isinstance(value, (int, torch.SymInt)) else tuple(value)
    if len(pair) != 2 or any(number < minimum for number in pair):
        raise ValueError(f"{name}={value!r}: expected an int or two ints, each at least {minimum}")
    return pair


def check_rank(name: str, tensor: Tensor, axes: str) -> None:
    """Raise ValueError unless ``tensor`` has the axes named in ``axes`` (separated by spaces)."""
    if tensor.dim() != len(axes.split()):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {len(axes.split())} axes [{axes}]")


def check_size(name: str, tensor: Tensor, axis: int, expected: int, why: str) -> None:
    """Raise ValueError unless ``tensor.shape[axis]`` is ``expected``."""
    if tensor.shape[axis] != expected:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: axis {axis} has size {tensor.shape[axis]}, "
            f"expected {expected} ({why})"
        )


def check_together(first: str, tensors: dict[str, Tensor | None]) -> None:
    """Raise ValueError unless all tensors are on one device and their dtypes can be used together.

    float32, bfloat16 and float16 can be mixed (autocast does that; the arithmetic is float32 anyway). float64 can only
    be used with float64, because otherwise its precision would be lost.
    """
    lead = tensors[first]
    assert lead is not None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATING:
            raise ValueError(f"{name} has dtype {tensor.dtype}: expected one of float32, float64, bfloat16, float16")
        if (tensor.dtype == torch.float64) != (lead.dtype == torch.float64):
            raise ValueError(
                f"{name} has dtype {tensor.dtype} but {first} has {lead.dtype}: float64 only goes with float64; "
                "convert one of them"
            )
        if tensor.device != lead.device:
            raise ValueError(f"{name} is on {tensor.device} but {first} is on {lead.device}: move it")


def is_readable(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` can be read without cost: on the CPU, real, and not being traced."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()


def to_levels(spatial_shapes: Tensor | Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """``spatial_shapes`` as a list of ``L`` pairs (H, W).

    Raises:
        ValueError: not L pairs, no level, or a size below 1.
    """
    rows = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else list(spatial_shapes)
    if not rows:
        raise ValueError("spatial_shapes is empty: expected at least one (H, W) pair")
    levels: list[tuple[int, int]] = []
    for row in rows:
        if isinstance(row, (int, float)) or len(row) != 2 or row[0] < 1 or row[1] < 1:
            raise ValueError(f"spatial_shapes={rows}: expected (H, W) pairs of positive ints, found {row!r}")
        levels.append((row[0], row[1]))
    return levels


def level_starts(levels: Sequence[tuple[int, int]]) -> list[int]:
    """First position of each level in the concatenation of levels: the exclusive cumulative sum of H*W."""
    starts = [0]
    for height, width in levels[:-1]:
        starts.append(starts[-1] + height * width)
    return starts
