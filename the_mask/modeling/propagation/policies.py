"""When a frame of a stream becomes a keyframe.

A policy measures something per frame; :func:`decide` turns the measure into a decision with hysteresis and gaps, and
keeps what it has to remember in a plain dict. Axes: B streams, h w cells of the working grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import Tensor

from the_mask.modeling.propagation.propagators import Propagated, Propagator

KEYFRAME_POLICIES = Registry("KEYFRAME_POLICIES")
KEYFRAME_POLICIES.__doc__ = "Classes of :class:`Measure`; ``MODEL.KEYFRAME.POLICY`` chooses one."

PolicyState = dict[str, Any]


class Measure:
    """The measure of a policy.

    Attributes:
        threshold: default value from which a keyframe is requested.
        needs: "" for the two frames alone (it decides before propagating), "propagation" for any propagator's result,
            "flow" or "intra" for one that has it.
    """

    threshold = 0.0
    needs = ""

    def __call__(self, frames: Tensor, previous: Tensor, propagated: Propagated | None) -> Tensor:
        """Values [B] for small RGB frames 0..255 [B, 3, h, w] and the frames before them."""
        raise NotImplementedError


@KEYFRAME_POLICIES.register()
class interval(Measure):
    """Every ``MODEL.KEYFRAME.INTERVAL``-th frame: the gap decides, nothing is measured."""

    threshold = float("inf")

    def __call__(self, frames: Tensor, previous: Tensor, propagated: Propagated | None) -> Tensor:
        return frames.new_zeros(frames.shape[0])


@KEYFRAME_POLICIES.register()
class scene_cut(Measure):
    """Mean change of hue, saturation and value, in 8-bit units as in PySceneDetect (default threshold 27)."""

    threshold = 27.0

    def __call__(self, frames: Tensor, previous: Tensor, propagated: Propagated | None) -> Tensor:
        change = (rgb_to_hsv(frames) - rgb_to_hsv(previous)).abs()
        hue = change[:, 0]
        change = torch.stack([torch.minimum(hue, 180 - hue), change[:, 1], change[:, 2]], dim=1)
        return change.mean(dim=(1, 2, 3))


@KEYFRAME_POLICIES.register()
class warp_error(Measure):
    """Photometric error of the warped previous frame, in standard deviations of the pixels."""

    threshold = 0.4
    needs = "flow"

    def __call__(self, frames: Tensor, previous: Tensor, propagated: Propagated | None) -> Tensor:
        assert propagated is not None
        return propagated.warp_error


@KEYFRAME_POLICIES.register()
class intra_weight(Measure):
    """Mean filter weight of the intra prediction: how little of the old segmentation was used."""

    threshold = 0.5
    needs = "intra"

    def __call__(self, frames: Tensor, previous: Tensor, propagated: Propagated | None) -> Tensor:
        assert propagated is not None
        assert propagated.intra_weight is not None
        return propagated.intra_weight


@KEYFRAME_POLICIES.register()
class disagreement(Measure):
    """Share of cells where the intra prediction has another class than the propagated scores."""

    threshold = 0.3
    needs = "intra"

    def __call__(self, frames: Tensor, previous: Tensor, propagated: Propagated | None) -> Tensor:
        assert propagated is not None
        assert propagated.intra is not None
        differs = propagated.intra.argmax(dim=1) != propagated.scores.argmax(dim=1)
        return differs.float().mean(dim=(1, 2))


def rgb_to_hsv(frames: Tensor) -> Tensor:
    """RGB 0..255 -> hue 0..180, saturation and value 0..255 (OpenCV's ranges), not rounded; [B, 3, h, w] both."""
    frames = frames.float()
    value, channel = frames.max(dim=1)
    spread = value - frames.amin(dim=1)
    red, green, blue = frames.unbind(dim=1)
    safe = spread.clamp(min=1e-6)
    sectors = torch.stack([(green - blue) / safe, 2 + (blue - red) / safe, 4 + (red - green) / safe], dim=1)
    hue = sectors.gather(1, channel[:, None])[:, 0] * 30 % 180
    return torch.stack([hue, 255 * spread / value.clamp(min=1e-6), value], dim=1)


@dataclass(frozen=True)
class Gate:
    """Turns measures into decisions.

    Attributes:
        threshold: value from which a measure requests a keyframe.
        rearm: after a requested keyframe, the measure must fall below ``rearm * threshold`` before it can request
            another one; 0 switches this off.
        min_gap, max_gap: fewest and most frames between keyframes; ``max_gap`` 0 sets no limit.
    """

    threshold: float
    rearm: float = 0.0
    min_gap: int = 1
    max_gap: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rearm <= 1:
            raise ValueError(f"MODEL.KEYFRAME.REARM is {self.rearm}; expected 0..1, a share of THRESHOLD")
        if self.min_gap < 1 or self.max_gap < 0 or 0 < self.max_gap < self.min_gap:
            raise ValueError(
                f"MODEL.KEYFRAME.MIN_GAP {self.min_gap} and MAX_GAP {self.max_gap}: expected 1 <= MIN_GAP <= MAX_GAP, "
                "or MAX_GAP 0 for no limit"
            )


def new_policy_state() -> PolicyState:
    """``armed``: the measure may request a keyframe; ``pending``: it did before ``min_gap`` was over."""
    return {"armed": True, "pending": False}


def decide(gate: Gate, state: PolicyState, value: float, gap: int) -> tuple[str, PolicyState]:
    """Decide about one frame.

    Args:
        gate: the limits.
        state: of :func:`new_policy_state` or the last decision; not changed.
        value: the measure.
        gap: frames since the last keyframe, 1 for the one right after it.

    Returns:
        "" for no keyframe, "gap" for one due to ``max_gap``, "measure" for one requested by the measure; and the new
        state.
    """
    armed = state["armed"] or value < gate.rearm * gate.threshold
    pending = state["pending"] or (armed and value >= gate.threshold)
    if pending and gap >= gate.min_gap:
        return "measure", {"armed": gate.rearm == 0, "pending": False}
    if gate.max_gap and gap >= gate.max_gap:
        return "gap", {"armed": armed, "pending": False}
    return "", {"armed": armed, "pending": pending}


def build_policy(cfg: CfgNode, propagator: Propagator) -> tuple[str, Measure, Gate]:
    """Name, measure and limits of ``cfg.MODEL.KEYFRAME``.

    Raises:
        ValueError: unknown policy, a policy that needs a network the propagator does not have, or bad limits.
    """
    options = cfg.MODEL.KEYFRAME
    name = options.POLICY
    if name not in KEYFRAME_POLICIES:
        known = ", ".join(sorted(key for key, _ in KEYFRAME_POLICIES))
        raise ValueError(f"MODEL.KEYFRAME.POLICY {name!r}: expected one of {known}")
    measure = KEYFRAME_POLICIES.get(name)()
    if (measure.needs == "flow" and not propagator.has_flow) or (measure.needs == "intra" and not propagator.has_intra):
        raise ValueError(
            f"MODEL.KEYFRAME.POLICY {name} needs the {measure.needs} network, which MODEL.KEYFRAME.PROPAGATOR "
            f"{options.PROPAGATOR} (INTRA {options.INTRA}) lacks; use gsvnet, or the policy scene_cut"
        )
    max_gap = options.MAX_GAP
    if name == "interval":
        if options.INTERVAL < 1:
            raise ValueError(f"MODEL.KEYFRAME.INTERVAL is {options.INTERVAL}; expected >= 1 frame")
        max_gap = options.INTERVAL
    threshold = measure.threshold if options.THRESHOLD is None else float(options.THRESHOLD)
    return name, measure, Gate(threshold, options.REARM, options.MIN_GAP, max_gap)
