"""The registry of context blocks and their signature. Axes: B clips, C channels, h w feature size, K classes.

A new block is one file with a builder ``(BlockInputs) -> ContextBlock`` under :func:`block_type`, its default options
in ``MODEL.BLOCKS.<TYPE>``, and one test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from fvcore.common.registry import Registry
from torch import Tensor, nn

from the_mask.modeling.pixel.context.types import MAIN, BlockOutput, ClipFeatures, FrameFeatures, PriorMap, TrainBatch

CONTEXT_BLOCKS = Registry("CONTEXT_BLOCKS")
CONTEXT_BLOCKS.__doc__ = "Builders ``(BlockInputs) -> ContextBlock`` by the type's name in expressions."


class ContextBlock(nn.Module):
    """One step of an expression: takes features of a frame, its memory and its prior; returns a new main level.

    Attributes:
        in_levels: levels it reads of the current frame; ``main`` is the output of the block before it.
        memory_levels: levels it reads of memory frames; () for an image block.
        memory_len: memory frames it reads, the newest ones.
        out_channels: of its feature.
        out_level: level whose size the feature has.
        uses_prior: whether it reads the prior.
        apply_to_memory: whether, in a chain, memory frames pass through it too, as single frames without a memory.
        stateful: whether :meth:`extra_losses`, :meth:`after_loss` and :meth:`after_step` are called.
        classifier_channels: channels that the head's classifier must read for :meth:`extra_losses`; 0 for any.
    """

    in_levels: tuple[str, ...] = (MAIN,)
    memory_levels: tuple[str, ...] = ()
    memory_len: int = 0
    out_channels: int
    out_level: str = MAIN
    uses_prior: bool = False
    apply_to_memory: bool = False
    stateful: bool = False
    classifier_channels: int = 0

    def forward(
        self, query: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> BlockOutput:
        """See the class; ``memory`` may hold more slots and levels than the block declares."""
        raise NotImplementedError

    def __call__(
        self, query: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> BlockOutput:
        return super().__call__(query, memory, prior)

    def extra_losses(self, classifier: nn.Module, iteration: int) -> dict[str, Tensor]:
        """Additional weighted losses by name; ``classifier`` is the head's last convolution."""
        return {}

    def after_loss(self, batch: TrainBatch, iteration: int) -> None:
        """Called without gradients after the losses of every training batch."""

    def after_step(self) -> None:
        """Called without gradients after every optimiser step."""


@dataclass(frozen=True)
class BlockInputs:
    """The inputs of a block's builder.

    Attributes:
        name: of the instance in the expression.
        options: ``MODEL.BLOCKS.<NAME>`` on top of ``MODEL.BLOCKS.<TYPE>``.
        levels: shapes of the current frame's levels, ``main`` among them.
        memory: shapes of the memory frames' levels.
        cfg: the whole config.
    """

    name: str
    options: CfgNode
    levels: Mapping[str, ShapeSpec]
    memory: Mapping[str, ShapeSpec]
    cfg: CfgNode

    def channels(self, level: str = MAIN) -> int:
        """Channels of a level of the current frame.

        Raises:
            ValueError: there is no such level.
        """
        return _channels(self.levels, level, self.name)

    def memory_channels(self, level: str = MAIN) -> int:
        """Channels of a level of the memory frames."""
        return _channels(self.memory, level, self.name)

    @property
    def norm(self) -> str:
        """``MODEL.SEM_SEG_HEAD.NORM``."""
        return self.cfg.MODEL.SEM_SEG_HEAD.NORM

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES

    @property
    def memory_length(self) -> int:
        """Number of memory frames T: the block's own MEMORY_LENGTH, or that of ``MODEL.CONTEXT``."""
        return self.options.get("MEMORY_LENGTH", 0) or self.cfg.MODEL.CONTEXT.MEMORY_LENGTH

    def choice(self, key: str, known: tuple[str, ...]) -> Any:
        """The value of an option with a fixed set of values.

        Raises:
            ValueError: another value.
        """
        value = self.options[key]
        if value not in known:
            raise ValueError(f"MODEL.BLOCKS.{self.name.upper()}.{key} {value!r}: expected one of {', '.join(known)}")
        return value


def _channels(levels: Mapping[str, ShapeSpec], level: str, name: str) -> int:
    if level not in levels:
        raise ValueError(f"block {name} reads level {level!r}; there are {', '.join(levels)}")
    channels = levels[level].channels
    assert channels is not None
    return channels


Builder = Callable[[BlockInputs], ContextBlock]


def block_type(name: str) -> Callable[[Builder], Builder]:
    """Decorator that registers a builder under a type's name."""

    def register(builder: Builder) -> Builder:
        builder.__name__ = name
        CONTEXT_BLOCKS.register(builder)
        return builder

    return register
