"""Allowed values of config keys, declared with the default: ``cfg.SOLVER.AMP.PRECISION = one_of("bf16", "fp16")``.

The files in ``keys/`` assign defaults. Values from :func:`one_of` and :func:`within` also define the validation of the
key, and are shown in the table of keys (:mod:`the_mask.config.table`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode


@dataclass(frozen=True)
class Allowed:
    """Default and allowed values of a key.

    Attributes:
        default: default value.
        choices: all allowed values; () for any.
        least, most: closed range of a number; None for no limit.
    """

    default: Any
    choices: tuple[Any, ...] = ()
    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(map(repr, self.choices))}"
        if self.least is not None and self.most is not None:
            return f"a number in {self.least}..{self.most}"
        return f"a number {f'>= {self.least}' if self.most is None else f'<= {self.most}'}"

    def fits(self, value: Any) -> bool:
        """Whether a value is allowed."""
        if self.choices:
            return value in self.choices
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


def one_of(default: Any, *others: Any) -> Any:
    """A key with a fixed set of values; the default comes first."""
    return Allowed(default, choices=(default, *others))


def within(default: float, least: float | None = None, most: float | None = None) -> Any:
    """A number with a closed range."""
    return Allowed(default, least=least, most=most)


class Recorder:
    """A view of a config: assigning :class:`Allowed` sets the default and records the allowed values.

    Args:
        node: the config, or a group in it.
        found: filled with the allowed values by full key.
        prefix: name of the group with a dot, "" for the whole config.
    """

    def __init__(self, node: CfgNode, found: dict[str, Allowed], prefix: str = "") -> None:
        vars(self).update(_node=node, _found=found, _prefix=prefix)

    def __getattr__(self, name: str) -> Any:
        value = self._node[name]
        return Recorder(value, self._found, f"{self._prefix}{name}.") if isinstance(value, CfgNode) else value

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Allowed):
            self._found[f"{self._prefix}{name}"] = value
            value = value.default
        self._node[name] = value


def add_and_record(cfg: CfgNode, subjects: Iterator[Callable[[Any], None]]) -> dict[str, Allowed]:
    """Call functions that add their keys to a config, in place; returns the allowed values by key."""
    found: dict[str, Allowed] = {}
    for add_keys in subjects:
        add_keys(Recorder(cfg, found))
    return found


def value_problems(cfg: CfgNode, allowed: Mapping[str, Allowed]) -> Iterator[str]:
    """Problems with the values of a config, one line each."""
    for key, what in allowed.items():
        value: Any = cfg
        for part in key.split("."):
            value = value[part]
        if not what.fits(value):
            yield f"{key} {value!r}: expected {what}"
