"""Ensembles: the class scores of several streams, each with its own preprocessing, normalised and averaged.

Axes: K classes, H W size of the source frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from the_mask.inference.merge import ScoreMean, check_merge, normalize_scores, score_labels
from the_mask.inference.saved_scores import check_same_classes
from the_mask.inference.views import OUTPUTS, FrameName, tiles

StreamState = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """One model of an ensemble.

    Attributes:
        stream: yields scores [K, H, W] at the size of the source frame: a ``ViewRunner`` or
            ``StreamingSegmentor`` with output "scores", or ``SavedScores``.
        name: for messages.
        class_names: its K classes; None when they are not known, then only their number is compared.
        weight: > 0.
        temperature: for normalisation "temperature".
    """

    stream: Any
    name: str
    class_names: Sequence[str] | None = None
    weight: float = 1.0
    temperature: float = 1.0


class EnsembleRunner:
    """A stream whose scores are the mean of its members' scores.

    Members run one after the other, so this holds the sum and one member's scores at a time, and each member's state.

    Args:
        members: at least one.
        normalization, mean: see :mod:`the_mask.inference.merge`.
        output: "labels" or "scores".

    Raises:
        ValueError: no members, members of different classes, unknown names, or a weight <= 0.
    """

    uses_names = True

    def __init__(
        self,
        members: Sequence[Member],
        normalization: str = "sum-to-one",
        mean: str = "arithmetic",
        output: str = "labels",
    ) -> None:
        check_merge(normalization, mean, "TEST.ENSEMBLE")
        if output not in OUTPUTS:
            raise ValueError(f"output is {output!r}; expected one of {', '.join(OUTPUTS)}")
        if not members:
            raise ValueError("an ensemble without members: set TEST.ENSEMBLE.CONFIGS or TEST.ENSEMBLE.SCORES")
        self.members = list(members)
        self.normalization = normalization
        self.mean = mean
        self.output = output
        check_members(self.members)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.members[0].stream.num_classes

    def init_state(self) -> StreamState:
        """State before a video: one state per member."""
        return {"members": [member.stream.init_state() for member in self.members]}

    def step(
        self, frame: np.ndarray | Tensor, state: StreamState, name: FrameName | None = None
    ) -> tuple[Tensor, StreamState]:
        """Segment the next frame; ``name`` is (video, frame), which saved scores need.

        Raises:
            ValueError: a foreign state. Also what the members raise, such as FileNotFoundError for missing scores.
        """
        if not isinstance(state, dict) or len(state.get("members", ())) != len(self.members):
            raise ValueError("not a state of this EnsembleRunner; make one with init_state()")
        total = ScoreMean(self.mean)
        states = []
        for member, member_state in zip(self.members, state["members"], strict=True):
            scores, member_state = step_named(member.stream, frame, member_state, name)
            states.append(member_state)
            classes, height, width = scores.shape
            total.start(classes, height, width, scores.device, member.weight)
            for rows in tiles(height):
                total.add_rows(rows, normalize_scores(scores[:, rows], self.normalization, member.temperature))
            del scores
        merged = total.result()
        return (score_labels(merged) if self.output == "labels" else merged), {"members": states}


def check_members(members: Sequence[Member]) -> None:
    """Raise a ValueError unless all members have the same classes and weights > 0."""
    first = members[0]
    for member in members:
        if not member.weight > 0:
            raise ValueError(f"TEST.ENSEMBLE.WEIGHTS: {member.name} has {member.weight}; expected a number > 0")
        if not member.temperature > 0:
            raise ValueError(f"TEST.ENSEMBLE.TEMPERATURES: {member.name} has {member.temperature}; expected > 0")
        if member.stream.num_classes != first.stream.num_classes:
            raise ValueError(
                f"the members of an ensemble need the same classes: {first.name} has {first.stream.num_classes}, "
                f"{member.name} {member.stream.num_classes}"
            )
        if first.class_names is not None and member.class_names is not None:
            check_same_classes(first.class_names, member.class_names, first.name, member.name)


def step_named(stream: Any, frame: Any, state: Any, name: FrameName | None) -> tuple[Tensor, Any]:
    """One step of any stream; only those with ``uses_names`` are told the frame's name."""
    if getattr(stream, "uses_names", False):
        return stream.step(frame, state, name)
    return stream.step(frame, state)
