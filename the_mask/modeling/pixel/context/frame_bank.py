"""FrameBank: the features of the last frames of a stream, so that each frame goes through the backbone once.

Its state is a list of ``{level: [B, C, h, w]}``, oldest first, in the stream's own dict: one bank serves any number of
streams, views and windows, each with its own state. Axes: B streams side by side (1 but for clips), T memory frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from the_mask.modeling.pixel.context.types import ClipFeatures, FrameFeatures, fill_missing

Ring = list[dict[str, Tensor]]


class FrameBank:
    """Keeps backbone levels only: whatever depends on a frame's slot is computed anew as the frame ages.

    Args:
        levels: backbone levels to keep.
        length: T, memory frames to give back.
        stride: frames between them; the newest is ``stride`` frames before the current one.
        policy: see :func:`the_mask.modeling.pixel.context.types.fill_missing`.
    """

    def __init__(self, levels: Sequence[str], length: int, stride: int = 1, policy: str = "repeat_first") -> None:
        self.levels = tuple(levels)
        self.length = length
        self.stride = stride
        self.policy = policy

    @property
    def capacity(self) -> int:
        """Frames kept at most."""
        return self.length * self.stride

    def push(self, ring: Ring, features: FrameFeatures) -> Ring:
        """The ring with a newer frame, detached, and without what is too old; ``ring`` itself is not changed."""
        if not self.capacity:
            return []
        kept = {level: features[level].detach() for level in self.levels}
        return [*ring, kept][-self.capacity :]

    def read(self, ring: Ring, current: FrameFeatures) -> ClipFeatures | None:
        """The T frames before ``current``, which is not in the ring yet; None for T = 0.

        Slots from before the stream's start are filled by the policy: ``repeat_first`` with the first frame, which is
        in the ring as long as a slot is missing.
        """
        if not self.length:
            return None
        now = {level: current[level] for level in self.levels}
        first = ring[0] if ring and self.policy != "repeat_current" else now
        backs = [self.stride * slot for slot in range(self.length, 0, -1)]
        frames = tuple(ring[-back] if back <= len(ring) else first for back in backs)
        batch = next(iter(now.values())).shape[0]
        valid = torch.tensor([back <= len(ring) for back in backs], device=next(iter(now.values())).device)
        if self.policy in ("repeat_first", "drop") and ring:
            valid = torch.ones_like(valid)
        return fill_missing(ClipFeatures(frames, valid.expand(batch, -1)), self.policy, now)
