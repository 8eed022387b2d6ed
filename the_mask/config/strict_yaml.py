"""Strict YAML parser: no duplicate keys, no alias bombs, no code unless allowed, and errors with file and line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import yaml

logger = logging.getLogger(__name__)
# For comparison: a dumped config with every key has about 30 KB and 1,500 nodes.
LARGEST, MOST_NODES = 1 << 22, 100_000


def parse_yaml(text: str | bytes, source: str = "YAML", allow_unsafe: bool = False) -> Any:
    """Parse a YAML text.

    Args:
        text: the text; bytes are UTF-8, or UTF-16 with a byte order mark.
        source: its file, for errors.
        allow_unsafe: allow tags that construct arbitrary Python objects.

    Raises:
        ValueError: invalid YAML; a duplicate key (the message has both lines); more than 100,000 values, counted with
            aliases expanded; an alias that contains itself; too long or nested too deep; a value that does not fit its
            tag; or a tag that builds Python objects.
    """
    if len(text) > LARGEST:
        raise ValueError(f"{source}: {len(text)} bytes, more than the {LARGEST} of any config")
    try:
        return _construct(text, source, _SafeLoader)
    except yaml.constructor.ConstructorError as error:
        if not allow_unsafe:
            raise ValueError(
                f"{source}: YAML that builds Python objects is refused (see --allow-unsafe-yaml): {error}"
            ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{source}: nested too deep") from error
    logger.warning("%s is read with permission to run code: it can do anything on this machine", source)
    return _construct(text, source, _UnsafeLoader)


class _Bounded:
    """Counts the values while they are parsed, so that a large file stops early."""

    seen = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.seen += 1
        if self.seen > MOST_NODES:
            line = self.peek_event().start_mark.line + 1  # type: ignore[attr-defined]
            raise yaml.YAMLError(f"line {line}: more than {MOST_NODES} values")
        return super().compose_node(parent, index)  # type: ignore[misc]


class _SafeLoader(_Bounded, yaml.SafeLoader):
    pass


class _UnsafeLoader(_Bounded, yaml.UnsafeLoader):
    pass


def _construct(text: str | bytes, source: str, loader_type: type[_SafeLoader] | type[_UnsafeLoader]) -> Any:
    loader = loader_type(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, source, {}, set())
        _check_scalars(node, source, loader, set())
        try:
            return loader.construct_document(node)
        except ValueError as error:
            # Values that only look like a date or a number: 2001-99-99, 0b_, thousands of digits.
            raise ValueError(f"{source}: a value cannot be read: {error}") from error
    finally:
        loader.dispose()


_PREFIX = "tag:yaml.org,2002:"
_BY_LOOK = {_PREFIX + kind for kind in ("bool", "int", "float", "null", "timestamp")}


def _check_scalars(node: yaml.Node, source: str, loader: _SafeLoader | _UnsafeLoader, seen: set[int]) -> None:
    """Refuse values that do not fit their tag, such as ``!!int x``: PyYAML raises many kinds of errors for them."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if node.tag in _BY_LOOK and (
        not isinstance(node, yaml.ScalarNode) or loader.resolve(yaml.ScalarNode, node.value, (True, False)) != node.tag
    ):
        kind = node.tag.removeprefix(_PREFIX)
        raise ValueError(f"{source}, line {node.start_mark.line + 1}: {str(node.value)[:60]!r} is no {kind}")
    for child in _children(node):
        _check_scalars(child, source, loader, seen)


def _count(node: yaml.Node, source: str, counts: dict[int, int], open_nodes: set[int]) -> int:
    """Number of nodes below a node with all aliases expanded; raises for a duplicate key or too many nodes."""
    if id(node) in counts:
        return counts[id(node)]
    if id(node) in open_nodes:
        raise ValueError(f"{source}, line {node.start_mark.line + 1}: an alias leads back to what it is part of")
    open_nodes.add(id(node))
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated_keys(node, source)
    total = 1 + sum(_count(child, source, counts, open_nodes) for child in _children(node))
    if total > MOST_NODES:
        raise ValueError(
            f"{source}, line {node.start_mark.line + 1}: aliases multiply to more than {MOST_NODES} values"
        )
    open_nodes.remove(id(node))
    counts[id(node)] = total
    return total


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from (key, value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _refuse_repeated_keys(node: yaml.MappingNode, source: str) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name, line = (key.tag, key.value), key.start_mark.line + 1
        if name in lines:
            raise ValueError(
                f"{source}: key {key.value} is given twice, in lines {lines[name]} and {line}; the first would be lost"
            )
        lines[name] = line
