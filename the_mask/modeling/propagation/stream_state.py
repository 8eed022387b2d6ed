"""The state of a propagated stream, of constant size.

    {"since_key": frames since the last keyframe, "keyframe": whether the last frame was one, "reason": why ("first",
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
from the_mask.modeling.stream import StreamState


def new_content(segmentor_state: StreamState) -> dict[str, Any]:
    """The content of a propagated stream's state before its first frame."""
    nothing = torch.empty(0)
    return {
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


def after_key(
    state: StreamState,
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
