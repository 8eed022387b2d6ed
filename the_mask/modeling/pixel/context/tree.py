"""Builds the blocks of a parsed expression, checks that they fit, and runs them.

Axes: B clips, T memory frames, C channels, h w feature size.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import nn

from the_mask.modeling.pixel.context.expression import ExpressionError, Name, Node, Operation, parse
from the_mask.modeling.pixel.context.registry import CONTEXT_BLOCKS, BlockInputs, ContextBlock
from the_mask.modeling.pixel.context.types import MAIN, BlockOutput, ClipFeatures, FrameFeatures, PriorMap
from the_mask.modeling.pixel.layers import resize_to


@dataclass(frozen=True)
class Scope:
    """Levels that the next block may read.

    Attributes:
        query: shapes of the current frame's levels.
        memory: shapes of the memory frames' levels.
        sources: memory level -> backbone levels it is made of.
    """

    query: Mapping[str, ShapeSpec]
    memory: Mapping[str, ShapeSpec]
    sources: Mapping[str, frozenset[str]]


class BlockTree:
    """An expression ready to run. It has no parameters: they are in :attr:`blocks`, which its owner registers.

    Attributes:
        blocks: the instances by name, in order of appearance.
        out_shape: channels and stride of the result.
        memory_length: T, the most memory frames that a block reads.
        memory_levels: backbone levels that memory frames need, sorted.
        uses_prior: whether a block reads the prior.
        is_concat: whether the outermost operation is ``&``.
    """

    def __init__(
        self, text: str, cfg: CfgNode, levels: Mapping[str, ShapeSpec], root_level: str, fold_memory: bool = True
    ) -> None:
        """
        Args:
            text: the expression.
            cfg: the whole config, with ``MODEL.BLOCKS``.
            levels: the backbone's.
            root_level: the one that is ``main`` at the start.
            fold_memory: memory frames pass through a block of a chain in one batch.

        Raises:
            ExpressionError: text that cannot be parsed; unknown or repeated blocks, wrong levels, channels that do not
                fit, a missing memory: at the position of the block or operator.
            ValueError: bad options of a block.
        """
        self.text = text
        self.cfg = cfg
        self.fold_memory = fold_memory
        self.root_level = root_level
        self.blocks = nn.ModuleDict()
        self._needed: set[str] = set()
        self.root: Node = parse(text)
        shapes = {**levels, MAIN: levels[root_level]}
        sources = {level: frozenset({level}) for level in levels} | {MAIN: frozenset({root_level})}
        self.out_shape = self._build(self.root, Scope(shapes, shapes, sources))[0]
        self.memory_length = max(block.memory_len for block in self.instances())
        self.memory_levels = tuple(sorted(self._needed))
        self.uses_prior = any(block.uses_prior for block in self.instances())
        self.is_concat = isinstance(self.root, Operation) and self.root.kind == "&"

    def instances(self) -> Iterator[ContextBlock]:
        """All blocks."""
        for block in self.blocks.values():
            assert isinstance(block, ContextBlock)
            yield block

    def run(
        self, features: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> BlockOutput:
        """Run on features of the current frame, memory of backbone levels, and prior; returns [B, C, h, w]."""
        if memory is not None and self.root_level in self.memory_levels:
            memory = memory.map(lambda frame: {**frame, MAIN: frame[self.root_level]})
        return self._run(self.root, {**features, MAIN: features[self.root_level]}, memory, prior)

    # Building.

    def _build(self, node: Node, scope: Scope) -> tuple[ShapeSpec, Scope]:
        """Shape of a node's result, and the levels that the next node of a chain may read."""
        if isinstance(node, Name):
            return self._build_block(node, scope)
        if node.kind == ">":
            shape = scope.query[MAIN]
            for part in node.parts:
                shape, scope = self._build(part, scope)
            return shape, scope
        shapes = [self._build(part, scope)[0] for part in node.parts]
        widths = [shape.channels or 0 for shape in shapes]
        if node.kind == "+" and len(set(widths)) > 1:
            raise ExpressionError(
                self.text, node.position, f"+ adds features of equal channels, these have {', '.join(map(str, widths))}"
            )
        channels = widths[0] if node.kind == "+" else sum(widths)
        shape = ShapeSpec(channels=channels, stride=min(shape.stride or 1 for shape in shapes))
        return shape, replace(scope, query={**scope.query, MAIN: shape})

    def _build_block(self, node: Name, scope: Scope) -> tuple[ShapeSpec, Scope]:
        if node.name in self.blocks:
            raise ExpressionError(
                self.text,
                node.position,
                f"block {node.name} occurs twice; call the second {node.name}2 with MODEL.BLOCKS.{node.name.upper()}2 "
                f"{{TYPE: {node.name}}}",
            )
        kind, options = self._options(node)
        inputs = BlockInputs(node.name, options, scope.query, scope.memory, self.cfg)
        try:
            block = CONTEXT_BLOCKS.get(kind)(inputs)
        except ValueError as error:
            raise ExpressionError(self.text, node.position, str(error)) from error
        for have, wanted, what in (
            (scope.query, block.in_levels, "the current frame"),
            (scope.memory, block.memory_levels, "memory frames"),
        ):
            missing = [level for level in wanted if level not in have]
            if missing:
                raise ExpressionError(
                    self.text,
                    node.position,
                    f"block {node.name} reads level {missing[0]!r} of {what}; there are {', '.join(have)}",
                )
        if block.memory_levels and block.memory_len < 1:
            raise ExpressionError(
                self.text,
                node.position,
                f"block {node.name} needs a memory: set MODEL.CONTEXT.MEMORY_LENGTH (it is {block.memory_len}) to at "
                "least 1",
            )
        self.blocks[node.name] = block
        for level in block.memory_levels:
            self._needed |= scope.sources[level]
        stride = scope.query[block.out_level].stride
        shape = ShapeSpec(channels=block.out_channels, stride=stride)
        scope = replace(scope, query={**scope.query, MAIN: shape})
        if block.apply_to_memory and all(level in scope.memory for level in block.in_levels):
            made_of = frozenset().union(*(scope.sources[level] for level in block.in_levels))
            scope = replace(scope, memory={**scope.memory, MAIN: shape}, sources={**scope.sources, MAIN: made_of})
        return shape, scope

    def _options(self, node: Name) -> tuple[str, CfgNode]:
        """Type and options of an instance: those of its own key on top of its type's."""
        blocks = self.cfg.MODEL.BLOCKS
        own = blocks.get(node.name.upper(), CfgNode())
        kind = own.get("TYPE", node.name)
        if kind not in CONTEXT_BLOCKS:
            known = sorted(key for key, _ in CONTEXT_BLOCKS)
            close = difflib.get_close_matches(kind, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise ExpressionError(self.text, node.position, f"unknown block {kind!r}; {hint}")
        options = blocks.get(kind.upper(), CfgNode()).clone()
        for key, value in own.items():
            if key != "TYPE" and key not in options:
                raise ExpressionError(
                    self.text,
                    node.position,
                    f"MODEL.BLOCKS.{node.name.upper()} has {key}, which a block of type {kind} does not know; it has "
                    f"{', '.join(options) or 'no options'}",
                )
            options[key] = value
        return kind, options

    # Running.

    def _run(
        self, node: Node, query: FrameFeatures, memory: ClipFeatures | None, prior: PriorMap | None
    ) -> BlockOutput:
        if isinstance(node, Name):
            return self.blocks[node.name](query, memory, prior)
        if node.kind == ">":
            return self._run_chain(node, query, memory, prior)
        outputs = [self._run(part, query, memory, prior) for part in node.parts]
        size = max((output.feature.shape[-2:] for output in outputs), key=lambda s: s[0] * s[1])
        maps = [resize_to(output.feature, size) for output in outputs]
        feature = torch.stack(maps).sum(dim=0) if node.kind == "+" else torch.cat(maps, dim=1)
        return BlockOutput(feature).with_aux_of(outputs)

    def _run_chain(
        self, node: Operation, query: FrameFeatures, memory: ClipFeatures | None, prior: PriorMap | None
    ) -> BlockOutput:
        outputs: list[BlockOutput] = []
        for index, part in enumerate(node.parts):
            outputs.append(self._run(part, query, memory, prior))
            if (
                memory is not None
                and self._passes_memory(part)
                and any(map(self._reads_memory, node.parts[index + 1 :]))
            ):
                memory = self._apply_to_memory(part, memory)
            query = {**query, MAIN: outputs[-1].feature}
        return outputs[-1].with_aux_of(outputs[:-1])

    def _passes_memory(self, node: Node) -> bool:
        return isinstance(node, Name) and bool(self.blocks[node.name].apply_to_memory)

    def _reads_memory(self, node: Node) -> bool:
        if isinstance(node, Name):
            return bool(self.blocks[node.name].memory_levels)
        return any(map(self._reads_memory, node.parts))

    def _apply_to_memory(self, node: Node, memory: ClipFeatures) -> ClipFeatures:
        """Run one block on the memory frames, as single frames: in one batch, or one after the other."""
        assert isinstance(node, Name)
        block = self.blocks[node.name]
        assert isinstance(block, ContextBlock)
        if not self.fold_memory:
            return memory.map(lambda frame: {**frame, MAIN: block(frame).feature})
        folded = {level: torch.cat(memory.level(level)) for level in block.in_levels}
        made = block(folded).feature.chunk(len(memory))
        frames = tuple({**frame, MAIN: x} for frame, x in zip(memory.frames, made, strict=True))
        return replace(memory, frames=frames)
