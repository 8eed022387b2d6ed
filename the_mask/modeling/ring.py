"""The state of a stream: the features of the last frames, in a plain dict that ``torch.save`` can write.

    {"size": [H, W] of the frames ([] before the first), "seen": frames since the last reset, "resets": size changes,
     "ring": one {"mask_features": [1,C,h,w], "maps": [[1,C_l,h_l,w_l], ...]} per kept frame, oldest first}

Functions return a new dict and leave the old one as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

StreamState = dict[str, Any]


def empty_state() -> StreamState:
    """Return the state before the first frame."""
    return {"size": [], "seen": 0, "resets": 0, "ring": []}


def push(
    state: StreamState, size: Sequence[int], mask_features: Tensor, maps: Sequence[Tensor], capacity: int
) -> StreamState:
    """Add a frame and forget what is older than ``capacity`` frames; a frame of another size starts the stream anew.

    Raises:
        ValueError: not a state of this module.
    """
    if not isinstance(state, dict) or set(state) != set(empty_state()):
        raise ValueError(f"not a stream state; make one with init_state(), a dict with {sorted(empty_state())}")
    changed = bool(state["size"]) and list(size) != list(state["size"])
    ring = [] if changed else state["ring"]
    return {
        "size": list(size),
        "seen": 1 if changed else state["seen"] + 1,
        "resets": state["resets"] + changed,
        "ring": [*ring, {"mask_features": mask_features, "maps": list(maps)}][-capacity:],
    }


def window(state: StreamState, frames: int, stride: int) -> list[dict[str, Any]]:
    """Return the newest frame and those ``stride``, 2 * ``stride``, ... before it, as far as seen; oldest first."""
    return state["ring"][::-1][::stride][:frames][::-1]


def reach(frames: int, stride: int) -> int:
    """Frames that a window of ``frames`` frames, ``stride`` apart, reaches back to."""
    return (frames - 1) * stride + 1
