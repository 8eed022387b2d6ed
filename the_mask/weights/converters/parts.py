"""A converter for one part of a model: how it recognises names, its rules, and the names of the result."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from the_mask.weights.converters.rules import Names, Rule, is_known

# Prefixes that training frameworks add to a model's own names.
BOOKKEEPING = r".*\.num_batches_tracked"


@dataclass(frozen=True)
class Part:
    """One layout of one kind of backbone or head.

    Attributes:
        title: name for reports.
        family: name for ``--from``.
        marks: patterns, each of which must match some name completely.
        rules: rules from its names to ours, for a backbone both without the prefix ``backbone.``.
        names: names that the result must have.
        unlike: patterns that no name may match.
        settings: config (key, value) pairs with which a model computes the same as the release, where they are not the
            defaults.
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
