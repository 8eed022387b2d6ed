"""Expressions that compose context blocks: ``afnb > (tma + channel)``.

``a > b`` feeds b with what a returns, ``a + b`` adds, ``a & b`` concatenates; both sides of ``+`` and ``&`` get
the same inputs. Different operators cannot be mixed without parentheses, so there is no precedence to remember.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OPERATORS = (">", "+", "&")
_TOKEN = re.compile(r"\s*(?:([A-Za-z_][A-Za-z0-9_]*)|([>+&()]))")


class ExpressionError(ValueError):
    """An expression that cannot be parsed or built; the message shows the position."""

    def __init__(self, text: str, position: int, problem: str) -> None:
        """
        Args:
            text: the expression.
            position: index of the character in question.
            problem: what is wrong and what is expected.
        """
        self.position = position
        super().__init__(f"MODEL.CONTEXT.EXPRESSION, position {position}: {problem}\n    {text}\n    {' ' * position}^")


@dataclass(frozen=True)
class Name:
    """A block instance, by name."""

    name: str
    position: int


@dataclass(frozen=True)
class Operation:
    """``parts[0] kind parts[1] kind ...``; ``position`` is that of the first operator."""

    kind: str
    parts: tuple[Node, ...]
    position: int


Node = Name | Operation


def parse(text: str) -> Node:
    """Parse an expression into a tree; chains of one operator are flat.

    Raises:
        ExpressionError: an unexpected character, a missing name, operator or parenthesis, or mixed operators.
    """
    tokens = _tokens(text)
    node, rest = _operation(text, tokens, 0)
    if rest < len(tokens):
        value, position = tokens[rest]
        problem = "unmatched )" if value == ")" else f"expected >, + or & before {value!r}"
        raise ExpressionError(text, position, problem)
    return node


def _tokens(text: str) -> list[tuple[str, int]]:
    tokens, at = [], 0
    end = len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            at += len(text[at:]) - len(text[at:].lstrip())
            raise ExpressionError(text, at, f"strange character {text[at]!r}: expected a block's name, >, +, & or ()")
        group = 1 if match.group(1) else 2
        tokens.append((match.group(group), match.start(group)))
        at = match.end()
    return tokens


def _operation(text: str, tokens: list[tuple[str, int]], at: int) -> tuple[Node, int]:
    first, at = _operand(text, tokens, at)
    parts, kind, position = [first], "", 0
    while at < len(tokens) and tokens[at][0] in OPERATORS:
        found, place = tokens[at]
        if kind and found != kind:
            raise ExpressionError(
                text, place, f"{kind!r} and {found!r} are mixed: say with parentheses which comes first"
            )
        if not kind:
            kind, position = found, place
        part, at = _operand(text, tokens, at + 1)
        parts.append(part)
    return (Operation(kind, tuple(parts), position) if kind else first), at


def _operand(text: str, tokens: list[tuple[str, int]], at: int) -> tuple[Node, int]:
    if at >= len(tokens):
        raise ExpressionError(text, len(text.rstrip()), "expected a block's name or (, but the expression ends")
    value, position = tokens[at]
    if value == "(":
        node, at = _operation(text, tokens, at + 1)
        if at >= len(tokens) or tokens[at][0] != ")":
            raise ExpressionError(text, position, "this ( is never closed")
        return node, at + 1
    if value in OPERATORS or value == ")":
        raise ExpressionError(text, position, f"expected a block's name or (, got {value!r}")
    return Name(value, position), at + 1
