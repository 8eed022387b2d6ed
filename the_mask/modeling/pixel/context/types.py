"""Types passed between backbone, context blocks and heads. Axes: B clips, T memory frames, K classes, C channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from the_mask.config.keys.context import PAD_POLICIES
from the_mask.data.clips import Clip
from the_mask.modeling.pixel.context.prior_map import PriorMap

# Level name -> [B, C, h, w]. Backbone levels keep their names; the output of a context block is "main".
FrameFeatures = Mapping[str, Tensor]
MAIN = "main"


@dataclass(frozen=True)
class ClipFeatures:
    """Features of the frames before the current one.

    Attributes:
        frames: T frames, oldest first.
        valid: bool [B, T]; a False slot holds finite values that must not be used.
    """

    frames: tuple[FrameFeatures, ...]
    valid: Tensor

    def __len__(self) -> int:
        return len(self.frames)

    def newest(self, length: int) -> ClipFeatures:
        """The last ``length`` slots.

        Raises:
            ValueError: there are fewer.
        """
        if length > len(self):
            raise ValueError(f"a context block needs {length} memory frames, the clip has {len(self)}")
        start = len(self) - length
        return ClipFeatures(self.frames[start:], self.valid[:, start:])

    def map(self, function: Callable[[FrameFeatures], FrameFeatures]) -> ClipFeatures:
        """The same slots with other features."""
        return replace(self, frames=tuple(function(frame) for frame in self.frames))

    def level(self, name: str) -> list[Tensor]:
        """One level of all frames: T tensors [B, C, h, w]."""
        return [frame[name] for frame in self.frames]

    def detach(self) -> ClipFeatures:
        """The same features without their graph."""
        return self.map(lambda frame: {name: value.detach() for name, value in frame.items()})


def all_valid(valid: Tensor) -> bool:
    """Whether every slot is valid, so that no mask is needed; always False while exporting, where it is not known."""
    return not torch.compiler.is_exporting() and bool(valid.all())


def fill_missing(memory: ClipFeatures, policy: str, current: FrameFeatures) -> ClipFeatures:
    """Fill the slots from before the video's start.

    Args:
        memory: slots, of which those before the first frame are not valid.
        policy: ``repeat_first`` (and ``drop``, which only keeps such clips out of training) copies the oldest valid
            slot, or the current frame if there is none; ``repeat_current`` copies the current frame; both make all
            slots valid. ``mask`` leaves them out of every attention.
        current: features of the current frame, with the levels of ``memory``.

    Raises:
        ValueError: unknown policy.
    """
    if policy not in PAD_POLICIES:
        raise ValueError(f"MODEL.CLIP_SEGMENTOR.PAD {policy!r}: expected one of {', '.join(PAD_POLICIES)}")
    if policy == "mask" or not len(memory) or all_valid(memory.valid):
        return memory
    fill: FrameFeatures = current
    frames: list[FrameFeatures] = []
    # From the newest slot to the oldest: the last valid slot found is the oldest, and is copied.
    for slot in range(len(memory) - 1, -1, -1):
        keep = memory.valid[:, slot, None, None, None]
        frame = memory.frames[slot]
        frames.append({name: torch.where(keep, frame[name], fill[name]) for name in frame})
        if policy != "repeat_current":
            fill = frames[-1]
    return ClipFeatures(tuple(reversed(frames)), torch.ones_like(memory.valid))


@dataclass(frozen=True)
class BlockOutput:
    """The output of a context block.

    Attributes:
        feature: [B, C, h, w], the new main level.
        aux_logits: class logits [B, K, h, w] by name, to be supervised too (training).
        aux_weights: weight of the loss of each.
    """

    feature: Tensor
    aux_logits: dict[str, Tensor] = field(default_factory=dict)
    aux_weights: dict[str, float] = field(default_factory=dict)

    def with_aux_of(self, others: Sequence[BlockOutput]) -> BlockOutput:
        """Also carry the auxiliary logits of other blocks."""
        outputs = [*others, self]
        return replace(
            self,
            aux_logits={name: x for output in outputs for name, x in output.aux_logits.items()},
            aux_weights={name: x for output in outputs for name, x in output.aux_weights.items()},
        )


@dataclass(frozen=True)
class HeadOutput:
    """The output of a head of ``ClipSegmentor``.

    Attributes:
        logits: [B, K, h, w].
        aux: further logits [B, K, h', w'] by name, to be supervised in training.
        aux_weights: weight of the loss of each; 0.4 where there is none.
        features: further tensors by name, including ``main`` (before the classifier).
    """

    logits: Tensor
    aux: dict[str, Tensor] = field(default_factory=dict)
    aux_weights: dict[str, float] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainBatch:
    """A training batch of ``ClipSegmentor``: T past frames and the current one, the only one supervised.

    Attributes:
        clips: of the mapper, cut to these frames and padded at the front with their oldest frame.
        images: [B, T+1, 3, H, W], normalised, oldest first.
        labels: int64 [B, H, W] of the current frame, padded with ``ignore_label``.
        valid: bool [B, T], False for a slot from before the video's start.
    """

    clips: Sequence[Clip]
    images: Tensor
    labels: Tensor
    valid: Tensor


__all__ = [
    "MAIN",
    "PAD_POLICIES",
    "BlockOutput",
    "ClipFeatures",
    "FrameFeatures",
    "HeadOutput",
    "PriorMap",
    "TrainBatch",
    "fill_missing",
]
