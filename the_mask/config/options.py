"""Options: the config keys that one part of the library reads, typed, with default, meaning and what is allowed.

An option is declared once and nowhere repeated::

    class LossOptions(Options, group="MODEL.MASK_FORMER"):
        \"\"\"Weights of the losses.\"\"\"

        # Weight of the cross-entropy of classes.
        class_weight: float = 2.0
        rounds: int = within(1, least=1, key="MODEL.THE_MASK.ROUNDS")

``LossOptions.from_config(cfg)`` reads the keys ``MODEL.MASK_FORMER.CLASS_WEIGHT`` and ``MODEL.THE_MASK.ROUNDS``,
``LossOptions(rounds=2)`` is the same without a config, and both refuse values that are not allowed by the name of the
key. The defaults, the validation of configs and ``docs/config.md`` are made from the same lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, FrozenInstanceError, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from detectron2.config import CfgNode
from typing_extensions import Self, dataclass_transform

T = TypeVar("T")


@dataclass(frozen=True)
class Allowed:
    """Allowed values of a key.

    Attributes:
        choices: all values it can have; () for any.
        least, most: closed range of a number; None is no limit.
    """

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

    def problem(self, key: str, value: Any) -> str:
        """What is wrong with a value, "" if nothing is."""
        return "" if self.fits(value) else f"{key} {value!r}: expected {self}"


def option(default: T, *, key: str = "", allowed: Allowed | None = None) -> T:
    """A field with a config key outside of its class's group."""
    declared: Any = field(default=default, metadata={"key": key, "allowed": allowed})
    return declared


def one_of(default: T, *others: T, key: str = "") -> T:
    """A field with few possible values, its default first."""
    return option(default, key=key, allowed=Allowed(choices=(default, *others)))


def within(default: T, least: float | None = None, most: float | None = None, *, key: str = "") -> T:
    """A number with a closed range."""
    return option(default, key=key, allowed=Allowed(least=least, most=most))


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Options:
    """Base of the options; a subclass becomes a frozen dataclass with keyword arguments. Lists become tuples.

    Attributes:
        group: config node of the fields, "" for a class that only others derive from.
        new_allowed: whether files may add keys of their own to the group.
        config_keys: full config key -> field.
    """

    group: ClassVar[str] = ""
    new_allowed: ClassVar[bool] = False
    config_keys: ClassVar[Mapping[str, Field[Any]]] = {}

    def __init_subclass__(cls, group: str = "", new_allowed: bool = False) -> None:
        super().__init_subclass__()
        cls.group, cls.new_allowed = group or cls.group, new_allowed
        # Making __init__, __repr__ and __eq__ for each class would take most of the time that importing them takes.
        dataclass(init=False, repr=False, eq=False)(cls)
        found: tuple[Field[Any], ...] = fields(cls)  # type: ignore[arg-type]  # it is one since the line above
        cls.config_keys = {f.metadata.get("key") or f"{cls.group}.{f.name.upper()}": f for f in found}

    def __init__(self, **values: Any) -> None:
        """
        Raises:
            ValueError: a value that is not allowed. TypeError: an unknown name.
        """
        for key, declared in self.config_keys.items():
            value = values.pop(declared.name, declared.default)
            allowed = declared.metadata.get("allowed")
            if allowed is not None and not allowed.fits(value):
                raise ValueError(allowed.problem(key, value))
            vars(self)[declared.name] = tuple(value) if isinstance(value, list) else value
        self.check()
        if values:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(values)}; it has {', '.join(vars(self))}")

    def check(self) -> None:
        """Raise a ValueError for values that are not allowed together; a subclass may define it."""

    def __setattr__(self, name: str, value: Any) -> None:
        raise FrozenInstanceError(f"cannot assign to {name!r}; dataclasses.replace makes other options")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Self:
        """The values of a config.

        Raises:
            ValueError: one that is not allowed.
        """
        return cls(**{declared.name: read_key(cfg, key) for key, declared in cls.config_keys.items()})

    @classmethod
    def add_to(cls, cfg: CfgNode) -> None:
        """Add the keys with their defaults to a config, in place."""
        for key, declared in {f"{cls.group}.": None, **cls.config_keys}.items():
            node = cfg
            *path, name = key.split(".")
            for part in path:
                if part not in node:
                    node[part] = CfgNode(new_allowed=cls.new_allowed)
                node = node[part]
            if declared is not None:
                value: Any = declared.default
                node[name] = list(value) if isinstance(value, tuple) else value


def read_key(cfg: CfgNode, key: str) -> Any:
    """Value of a full key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def value_problems(cfg: CfgNode, allowed: Mapping[str, Allowed]) -> Iterator[str]:
    """What is wrong with the values of a config, one line each."""
    yield from filter(None, (what.problem(key, read_key(cfg, key)) for key, what in allowed.items()))
