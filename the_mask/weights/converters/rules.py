"""Rules that rename, split, join or drop tensors by name, and templates of the names that must exist.

A converter is a table of :class:`Rule`, which the functions of this module apply. Nothing here is specific to a family.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch
from torch import Tensor

# A replacement as for ``re.sub`` (``\1``), or a function of the match.
Template = str | Callable[[re.Match[str]], str]


@dataclass(frozen=True)
class Target:
    """A tensor made from a matched one.

    Attributes:
        name: its new name.
        change: applied to the tensor.
        part: number of this part when several tensors are joined (along the first axis) into ``name``.
        parts: number of parts.
    """

    name: Template
    change: Callable[[Tensor], Tensor] | None = None
    part: Callable[[re.Match[str]], int] | None = None
    parts: int = 1


@dataclass(frozen=True)
class Rule:
    """The targets of names that ``pattern`` matches completely; without targets they are left out."""

    pattern: str
    targets: tuple[Target, ...] = ()
    reason: str = ""


def move(pattern: str, name: Template, change: Callable[[Tensor], Tensor] | None = None) -> Rule:
    """Rename a tensor, and optionally change it."""
    return Rule(pattern, (Target(name, change),))


def split(pattern: str, *names: Template) -> Rule:
    """Split a tensor along its first axis into equal pieces, one per name; a repeated name gets several pieces.

    ``split(p, "q", "kv", "kv")``: the first third is ``q``, the others together are ``kv``.
    """
    count = len(names)
    targets = []
    for name in dict.fromkeys(names):
        first, pieces = names.index(name), names.count(name)
        targets.append(Target(name, partial(_pieces, first=first, pieces=pieces, count=count)))
    return Rule(pattern, tuple(targets))


def _pieces(x: Tensor, first: int, pieces: int, count: int) -> Tensor:
    size = len(x) // count
    return x[first * size : (first + pieces) * size]


def join(pattern: str, name: Template, order: Sequence[str]) -> Rule:
    """Join tensors along the first axis in the order in which the pattern's group ``part`` is listed in ``order``."""
    return Rule(pattern, (Target(name, None, lambda match: order.index(match["part"]), len(order)),))


def drop(pattern: str, reason: str) -> Rule:
    """Leave out a tensor; the report gives the reason."""
    return Rule(pattern, (), reason)


@dataclass
class Mapped:
    """Result of :func:`apply_rules`.

    Attributes:
        state: tensors by their new names.
        used: old names that are in ``state``.
        ignored: old names that are left out, and why.
        unknown: old names that no rule matches.
        incomplete: new names of which some parts are missing.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)


def apply_rules(rules: Iterable[Rule], state: Mapping[str, Tensor], known: Callable[[str], bool]) -> Mapped:
    """Rename tensors by the first rule that matches each name.

    Args:
        rules: in order of precedence.
        state: tensors by name.
        known: whether a name is already a native one; it is kept when no rule matches.

    Raises:
        ValueError: two tensors get the same name.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    mapped = Mapped()
    pieces: dict[str, dict[int, Tensor]] = defaultdict(dict)
    wanted: dict[str, int] = {}
    for name, tensor in state.items():
        match, rule = next(
            ((found, rule) for pattern, rule in compiled if (found := pattern.fullmatch(name))), (None, None)
        )
        if match is None or rule is None:
            if known(name):
                mapped.used.append(name)
                _put(pieces, wanted, name, 0, 1, tensor)
            else:
                mapped.unknown.append(name)
            continue
        if not rule.targets:
            mapped.ignored[name] = rule.reason
            continue
        mapped.used.append(name)
        for target in rule.targets:
            new = match.expand(target.name) if isinstance(target.name, str) else target.name(match)
            part = target.part(match) if target.part else 0
            _put(pieces, wanted, new, part, target.parts, target.change(tensor) if target.change else tensor)
    for name, parts in pieces.items():
        if len(parts) < wanted[name]:
            mapped.incomplete.append(f"{name} (only {len(parts)} of {wanted[name]} parts)")
        else:
            mapped.state[name] = parts[0] if len(parts) == 1 else torch.cat([parts[i] for i in sorted(parts)])
    return mapped


def _put(
    pieces: dict[str, dict[int, Tensor]], wanted: dict[str, int], name: str, part: int, parts: int, tensor: Tensor
) -> None:
    if part in pieces[name]:
        raise ValueError(f"two tensors of the file become {name!r}: it mixes two layouts")
    pieces[name][part] = tensor
    wanted[name] = parts


def expand(template: str) -> list[str]:
    """Write out braces (``a.{b,c}`` gives ``a.b`` and ``a.c``; ``{0..2}`` counts) and a last ``.*`` (weight, bias)."""
    if template.endswith(".*"):
        template = f"{template[:-2]}.{{weight,bias}}"
    inner = re.search(r"\{([^{}]*)\}", template)
    if inner is None:
        return [template]
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", inner[1])
    options = map(str, range(int(counted[1]), int(counted[2]) + 1)) if counted else inner[1].split(",")
    texts = (text for o in options for text in expand(template[: inner.start()] + o + template[inner.end() :]))
    # The innermost brace goes first, so alternatives next to it occur several times.
    return list(dict.fromkeys(texts))


@dataclass(frozen=True)
class Names:
    """Names that belong together, as templates separated by spaces.

    ``#`` is an index that counts from 0, with at least one value; at each value all names of the group must exist. Its
    range is read from the names. ``#d`` (with any letter) is one index shared by all templates with this letter.
    ``.*`` and ``{...}``: see :func:`expand`.

    Attributes:
        templates: the names.
        optional: all of them may be missing, but not only some.
    """

    templates: str
    optional: bool = False

    def expanded(self) -> list[str]:
        return [name for template in self.templates.split() for name in expand(template)]


INDEX = re.compile(r"#([a-z]?)")


def is_known(groups: Iterable[Names]) -> Callable[[str], bool]:
    """A function that tells whether a name belongs to any of the groups."""
    texts = (re.escape(name).replace(r"\#", "#") for group in groups for name in group.expanded())
    pattern = re.compile("|".join(INDEX.sub(r"\\d+", text) for text in texts) or r"(?!)")
    return lambda name: pattern.fullmatch(name) is not None or name.endswith(".num_batches_tracked")


def absent(groups: Sequence[Names], names: Iterable[str]) -> list[str]:
    """Names that the groups require and ``names`` does not have; an index without any value is shown as ``#``."""
    present = set(names)
    missing = []
    counts = _index_counts(groups, present)
    for group in groups:
        wanted = [full for name in group.expanded() for full in _fill(name, counts)]
        lacking = [name for name in wanted if name not in present]
        if lacking and not (group.optional and len(lacking) == len(wanted)):
            missing += lacking
    return missing


def _index_counts(groups: Sequence[Names], present: set[str]) -> dict[str, int]:
    """Number of values of each index, by its letter or by the text before it."""
    counts: dict[str, int] = defaultdict(int)
    prefixes: dict[str, str] = {}
    for name in (name for group in groups for name in group.expanded()):
        for match in INDEX.finditer(name):
            prefixes[name[: match.start()]] = match[1] or name[: match.start()]
    for prefix, key in prefixes.items():
        pattern = re.compile(INDEX.sub(r"\\d+", re.escape(prefix).replace(r"\#", "#")) + r"(\d+)(?:\.|$)")
        found = [int(hit[1]) for name in present if (hit := pattern.match(name))]
        counts[key] = max(counts[key], 1 + max(found, default=-1))
    return counts


def _fill(name: str, counts: Mapping[str, int]) -> list[str]:
    """Expand the indices of a name."""
    places = [(match, counts[match[1] or name[: match.start()]]) for match in INDEX.finditer(name)]
    if any(count == 0 for _, count in places):
        return [INDEX.sub("#", name)]
    filled = []
    for values in product(*(range(count) for _, count in places)):
        text, offset = name, 0
        for (match, _), value in zip(places, values, strict=True):
            start, end = match.start() + offset, match.end() + offset
            text = f"{text[:start]}{value}{text[end:]}"
            offset = len(text) - len(name)
        filled.append(text)
    return filled
