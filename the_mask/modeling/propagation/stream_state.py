"""What a propagated stream remembers: a plain dict of constant size that ``torch.save`` can write.

    {"size": [H, W] of the frames ([] before the first), "seen": frames since the last reset, "resets": size changes,
     "since_key": frames since the last keyframe, "keyframe": whether the last frame was one, "reason": why ("first",
     "requested", "gap" or the policy's name; "" for a propagated frame), "requested": make the next frame a keyframe,
     "scores": [K, h, w] carried scores, "frame": [3, h, w] small RGB frame 0..255,
     "queries": [Q, h, w] mask logits, "query_classes": [Q, K] class scores of the queries (both empty without queries),
     "policy": {...}, "segmentor": the key segmentor's own state}

Axes: K classes, Q queries, h w cells of the working grid, H W pixels of the frames. Functions return new dicts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from the_mask.modeling.propagation.policies import new_policy_state

StreamState = dict[str, Any]


def empty_state(segmentor_state: StreamState) -> StreamState:
    """State before the first frame."""
    nothing = torch.empty(0)
    return {
        "size": [],
        "seen": 0,
        "resets": 0,
        "since_key": 0,
        "keyframe": False,
        "reason": "",
        "requested": False,
        "scores": nothing,
        "frame": nothing,
        "queries": nothing,
        "query_classes": nothing,
        "policy": new_policy_state(),
        "segmentor": segmentor_state,
    }


def check_state(state: Any) -> None:
    """Raise a ValueError unless ``state`` has the keys of this module."""
    if not isinstance(state, dict) or set(state) != set(empty_state({})):
        raise ValueError(
            f"not a state of PropagatedSegmentor; make one with init_state(), with {sorted(empty_state({}))}"
        )


def resized(state: StreamState, size: tuple[int, int], segmentor_state: StreamState) -> StreamState:
    """The state for a frame of ``size``: the same, or an empty one if frames had another size, which is counted."""
    if not state["size"] or list(state["size"]) == list(size):
        return state
    return {**empty_state(segmentor_state), "resets": state["resets"] + 1}


def forced_reason(state: StreamState) -> str:
    """Why the next frame has to be a keyframe whatever the policy says; "" if it need not."""
    if not state["seen"]:
        return "first"
    return "requested" if state["requested"] else ""


def after_key(
    state: StreamState,
    size: tuple[int, int],
    frame: Tensor,
    scores: Tensor,
    segmentor_state: StreamState,
    reason: str,
    queries: tuple[Tensor, Tensor] | None = None,
) -> StreamState:
    """State after a keyframe; ``queries`` are class scores [Q, K] and mask logits [Q, h, w]."""
    nothing = torch.empty(0)
    classes, masks = queries or (nothing, nothing)
    return {
        **state,
        "size": list(size),
        "seen": state["seen"] + 1,
        "since_key": 0,
        "keyframe": True,
        "reason": reason,
        "requested": False,
        "scores": scores,
        "frame": frame,
        "queries": masks,
        "query_classes": classes,
        "policy": {**state["policy"], "pending": False},
        "segmentor": segmentor_state,
    }


def after_propagation(state: StreamState, frame: Tensor, scores: Tensor, queries: Tensor | None) -> StreamState:
    """State after a propagated frame."""
    return {
        **state,
        "seen": state["seen"] + 1,
        "since_key": state["since_key"] + 1,
        "keyframe": False,
        "reason": "",
        "scores": scores,
        "frame": frame,
        "queries": state["queries"] if queries is None else queries,
    }
