"""Schemas of file contents, checked before the content is used.

A schema is a type, a tuple of types, a dictionary of keys (others are allowed beside them), :class:`Each`,
:class:`Maybe` or :class:`Number`::

    check_schema(content, {"classes": Each(list, str, least=1), "seed": Maybe(int)}, "scores.json")
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Each:
    """A list or dictionary with at least ``least`` and at most ``most`` items, each of one schema."""

    kind: type
    item: Any = object
    least: int = 0
    most: int | None = None


@dataclass(frozen=True)
class Maybe:
    """May be absent or None."""

    value: Any


@dataclass(frozen=True)
class Number:
    """A finite number in a range; a whole one unless ``kind`` is float."""

    least: float = -math.inf
    most: float = math.inf
    kind: type = int


def check_schema(value: Any, schema: Any, where: str, key: str = "") -> None:
    """Check a value against a schema.

    Args:
        value: the value.
        schema: see above; a bool is not an int.
        where: start of the error message, with the file: "x.pth is no checkpoint of a training".
        key: of the value, its parts joined by dots.

    Raises:
        ValueError: the value does not fit; the message names the file, the key and the value found.
    """
    if isinstance(schema, Maybe):
        if value is not None:
            check_schema(value, schema.value, where, key)
    elif isinstance(schema, dict):
        check_schema(value, dict, where, key)
        for name, part in schema.items():
            check_schema(value.get(name), part, where, f"{key}.{name}" if key else str(name))
    elif isinstance(schema, Each):
        check_schema(value, (list, tuple) if schema.kind is list else schema.kind, where, key)
        if len(value) < schema.least or (schema.most is not None and len(value) > schema.most):
            raise ValueError(f"{where}: {key or 'it'!r} has {len(value)} items")
        if schema.item is not object:
            for name, item in value.items() if schema.kind is dict else enumerate(value):
                check_schema(item, schema.item, where, f"{key}.{name}" if key else str(name))
    elif isinstance(schema, Number):
        check_schema(value, (int, float) if schema.kind is float else int, where, key)
        if isinstance(value, bool) or not schema.least <= value <= schema.most or not math.isfinite(value):
            raise ValueError(f"{where}: {key!r} is {_short(value)}, expected {_range(schema)}")
    elif not isinstance(value, schema) or (isinstance(value, bool) and schema is int):
        kinds = schema if isinstance(schema, tuple) else (schema,)
        found = "absent" if value is None else f"a {type(value).__name__}"
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{where}: {f'{key[:200]!r}' if key else 'it'} is {found}, expected {wanted}")


def _short(value: Any) -> str:
    # Python refuses to write whole numbers of thousands of digits.
    return "a number of very many digits" if isinstance(value, int) and value.bit_length() > 200 else repr(value)


def _range(schema: Number) -> str:
    what = "a whole number" if schema.kind is int else "a number"
    low, high = math.isfinite(schema.least), math.isfinite(schema.most)
    if low and high:
        return f"{what} {schema.least:g}..{schema.most:g}"
    return f"{what} from {schema.least:g} on" if low else f"{what} up to {schema.most:g}" if high else what
