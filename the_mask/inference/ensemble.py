"""Ensembles: normalises and averages the class scores of several streams, each with its own preprocessing.

Axes: K classes, H W size of the source frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from the_mask.inference.merge import ScoreMean, check_merge, normalize_scores
from the_mask.inference.saved_scores import check_same_classes
from the_mask.inference.views import tiles
from the_mask.modeling.stream import NO_HINTS, Hints, Stream, StreamState


@dataclass(frozen=True)
class Member:
    """One model of an ensemble.

    Attributes:
        stream: yields scores [K, H, W] at the size of the source frame: a ``StreamingSegmentor`` or ``MultiView`` with
            output "scores", ``MultiStage``, or ``SavedScores``.
        name: for messages.
        class_names: its K classes; None if they are not known, in which case only their number is compared.
        weight: > 0.
        temperature: for normalisation "temperature".
    """

    stream: Stream
    name: str
    class_names: Sequence[str] | None = None
    weight: float = 1.0
    temperature: float = 1.0


class Ensemble(Stream):
    """A stream whose scores are the mean of its members' scores.

    Members run one after the other, so only the sum, the scores of one member and the members' states are in memory.

    Args:
        members: at least one.
        normalization, mean: see :mod:`the_mask.inference.merge`.

    Raises:
        ValueError: no members, members of different classes, unknown names, or a weight <= 0.
    """

    def __init__(
        self,
        members: Sequence[Member],
        normalization: str = "sum-to-one",
        mean: str = "arithmetic",
    ) -> None:
        check_merge(normalization, mean, "TEST.ENSEMBLE")
        if not members:
            raise ValueError("an ensemble without members: set TEST.ENSEMBLE.CONFIGS or TEST.ENSEMBLE.SCORES")
        self.members = list(members)
        self.normalization = normalization
        self.mean = mean
        check_members(self.members)
        self.num_classes = self.members[0].stream.num_classes

    def init_state(self) -> StreamState:
        """State before a video: one state per member."""
        return self.new_state(members=[member.stream.init_state() for member in self.members])

    def check_state(self, state: StreamState) -> None:
        """See :class:`Stream`; the number of members must match, too."""
        super().check_state(state)
        if len(state["members"]) != len(self.members):
            raise ValueError(f"a state of {len(state['members'])} members, but there are {len(self.members)}")

    def step(
        self, frame: np.ndarray | Tensor, state: StreamState, hints: Hints = NO_HINTS
    ) -> tuple[Tensor, StreamState]:
        """Scores [K, H, W] float32 of the next frame; saved scores need its name.

        Raises:
            ValueError: a state of another stream. Errors of members are passed on, e.g. FileNotFoundError for missing
                scores.
        """
        state = self.continue_state(state, frame.shape[:2])
        total = ScoreMean(self.mean)
        inner = []
        for member, member_state in zip(self.members, state["members"], strict=True):
            scores, member_state = member.stream.step(frame, member_state, hints)
            inner.append(member_state)
            classes, height, width = scores.shape
            total.start(classes, height, width, scores.device, member.weight)
            for rows in tiles(height):
                total.add_rows(rows, normalize_scores(scores[:, rows], self.normalization, member.temperature))
            del scores
        return total.result(), {**state, "seen": state["seen"] + 1, "members": inner}


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
