"""The part of a model that a converter is for: its marks, its rules, and what the result must hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from the_mask.weights.converters.rules import Names, Rule, is_known

# What training frameworks add to a model's own names.
BOOKKEEPING = r".*\.num_batches_tracked"


@dataclass(frozen=True)
class Part:
    """One layout of one kind of backbone or head.

    Attributes:
        title: for reports.
        family: what ``--from`` calls it.
        marks: patterns each of which some name must match completely.
        rules: from its names to ours, both without the ``backbone.`` in front for a backbone.
        names: what must be there afterwards.
        unlike: patterns that no name may match.
        settings: (key, value) of a config under which a model computes what the release computes, where that is not
            the default.
    """

    title: str
    family: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]
    names: tuple[Names, ...]
    unlike: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()

    def recognises(self, names: Collection[str]) -> bool:
        """Whether the names are in this layout."""

        def occurs(pattern: str) -> bool:
            return any(re.fullmatch(pattern, name) for name in names)

        return all(map(occurs, self.marks)) and not any(map(occurs, self.unlike))

    @property
    def known(self) -> Callable[[str], bool]:
        """Whether a name is one of ours."""
        return is_known(self.names)
