"""Checks of ``MODEL.KEYFRAME``."""

from __future__ import annotations

from collections.abc import Sequence

from the_mask.config.keys.keyframe import CARRIED


def check_options(
    stride: int,
    key_scale: float,
    carry: str,
    distances: Sequence[int],
    unroll: int,
    class_weights: Sequence[float],
    num_classes: int,
) -> None:
    """Raise a ValueError that names the key of the first value outside of its range."""
    key = "MODEL.KEYFRAME."
    if stride < 1:
        raise ValueError(f"{key}STRIDE is {stride}; expected >= 1 pixel")
    if not 0 < key_scale <= 2:
        raise ValueError(f"{key}KEY_SCALE is {key_scale}; expected above 0 and at most 2")
    if carry not in CARRIED:
        raise ValueError(f"{key}CARRY is {carry!r}; expected one of {', '.join(CARRIED)}")
    if not distances or min(distances) < 1:
        raise ValueError(f"{key}DISTANCES {list(distances)}: expected whole numbers of frames >= 1, at least one")
    if unroll < 0:
        raise ValueError(f"{key}UNROLL is {unroll}; expected >= 1 step, or 0 for all")
    if class_weights and len(class_weights) != num_classes:
        raise ValueError(f"{key}CLASS_WEIGHTS has {len(class_weights)} values for {num_classes} classes")
