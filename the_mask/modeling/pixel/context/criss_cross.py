"""Criss-cross attention: a position attends to its row, its column and, with a memory, to its column in time.

CCNet in two dimensions; the temporal modes are this project's readings of the attention study (spec section 2.5). Axes:
B clips, T memory slots, D = T + 1 frames, C channels, c = C/8 key channels, h w feature size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from the_mask.modeling.pixel.context.dense import Surrounded
from the_mask.modeling.pixel.context.registry import BlockInputs, ContextBlock, block_type
from the_mask.modeling.pixel.context.types import MAIN, BlockOutput, ClipFeatures, FrameFeatures, PriorMap

MODES = ("cc2d", "cc3d_full", "cc_separable", "cc_query")


def cross_logits(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Logits along the row, [B, h, w, w'], and along the column, [B, h, w, h'], of every position.

    The position itself belongs to its row; in its column it is -inf, so that it counts only once.

    Args:
        query, key: [B, c, h, w].
    """
    row = torch.einsum("bchw,bchv->bhwv", query, key)
    column = torch.einsum("bchw,bcuw->bhwu", query, key)
    itself = torch.eye(query.shape[2], dtype=torch.bool, device=query.device)
    return row, column.masked_fill(itself[None, :, None], float("-inf"))


def cross_sum(row: Tensor, column: Tensor, value: Tensor) -> Tensor:
    """Weighted sum of values [B, C, h, w] along rows and columns with weights as in :func:`cross_logits`."""
    return torch.einsum("bhwv,bchv->bchw", row, value) + torch.einsum("bhwu,bcuw->bchw", column, value)


def criss_cross(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax over the h + w - 1 positions of the cross, times their values [B, C, h, w]."""
    row, column = cross_logits(query, key)
    weights = torch.cat([row, column], dim=-1).softmax(dim=-1)
    row, column = weights.split([row.shape[-1], column.shape[-1]], dim=-1)
    return cross_sum(row, column, value)


def criss_cross_3d(query: Tensor, key: Tensor, value: Tensor, valid: Tensor) -> Tensor:
    """softmax over the h + w + D - 2 positions in row, column and time of every position of every frame.

    Args:
        query, key: [B, D, c, h, w].
        value: [B, D, C, h, w].
        valid: bool [B, D]; invalid frames are not attended to.
    """
    batch, frames = valid.shape
    row, column = cross_logits(query.flatten(0, 1), key.flatten(0, 1))
    row, column = (x.unflatten(0, (batch, frames)) for x in (row, column))
    time = torch.einsum("bdchw,bechw->bdhwe", query, key)
    itself = torch.eye(frames, dtype=torch.bool, device=query.device)[None]
    hidden = (itself | ~valid[:, None]).view(batch, frames, 1, 1, frames)
    weights = torch.cat([row, column, time.masked_fill(hidden, float("-inf"))], dim=-1).softmax(dim=-1)
    row, column, time = weights.split([row.shape[-1], column.shape[-1], frames], dim=-1)
    inside = cross_sum(row.flatten(0, 1), column.flatten(0, 1), value.flatten(0, 1)).unflatten(0, (batch, frames))
    return inside + torch.einsum("bdhwe,bechw->bdchw", time, value)


def criss_cross_query(query: Tensor, key: Tensor, value: Tensor, valid: Tensor) -> Tensor:
    """softmax over the D (h + w - 1) positions on the cross of every position in each of D frames.

    Args:
        query: [B, c, h, w] of the current frame.
        key: [B, D, c, h, w].
        value: [B, D, C, h, w].
        valid: bool [B, D].
    """
    parts, widths = [], []
    for t in range(key.shape[1]):
        hidden = ~valid[:, t, None, None, None]
        for logits in cross_logits(query, key[:, t]):
            parts.append(logits.masked_fill(hidden, float("-inf")))
            widths.append(logits.shape[-1])
    weights = torch.cat(parts, dim=-1).softmax(dim=-1).split(widths, dim=-1)
    sums = [cross_sum(weights[2 * t], weights[2 * t + 1], value[:, t]) for t in range(key.shape[1])]
    return torch.stack(sums).sum(dim=0)


def time_column(query: Tensor, key: Tensor, value: Tensor, valid: Tensor) -> Tensor:
    """softmax over the D frames at the same position, times their values; shapes as for :func:`criss_cross_query`."""
    logits = torch.einsum("bchw,bdchw->bdhw", query, key)
    weights = logits.masked_fill(~valid[:, :, None, None], float("-inf")).softmax(dim=1)
    return torch.einsum("bdhw,bdchw->bchw", weights, value)


class CrissCrossStep(nn.Module):
    """Query, key and value convolutions and the residual weight gamma, which starts at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_query = nn.Conv2d(channels, max(channels // 8, 1), 1)
        self.to_key = nn.Conv2d(channels, max(channels // 8, 1), 1)
        self.to_value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def frames(self, conv: nn.Module, x: Tensor) -> Tensor:
        """A convolution on [B, D, C, h, w], frame by frame in one batch."""
        return conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class CrissCross(ContextBlock):
    """R recurrences of criss-cross attention with shared weights.

    Modes: ``cc2d`` current frame only; ``cc3d_full`` all frames attend and are updated, the last one is decoded;
    ``cc_separable`` R spatial steps on the current frame, then one in time; ``cc_query`` the current frame attends to
    the crosses in all frames, memory is never updated.
    """

    def __init__(self, channels: int, mode: str, recurrence: int, memory_len: int) -> None:
        """
        Args:
            channels: C.
            mode: see the class.
            recurrence: R >= 1.
            memory_len: T; not used by ``cc2d``.

        Raises:
            ValueError: R below 1.
        """
        super().__init__()
        if recurrence < 1:
            raise ValueError(f"criss-cross attention: R {recurrence}: expected at least 1")
        self.mode = mode
        self.recurrence = recurrence
        self.out_channels = channels
        self.space = CrissCrossStep(channels)
        self.time = CrissCrossStep(channels) if mode == "cc_separable" else None
        if mode != "cc2d":
            self.memory_len = memory_len
            self.memory_levels = (MAIN,)

    def forward(
        self, query: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> BlockOutput:
        x = query[MAIN]
        if self.mode == "cc2d":
            return BlockOutput(self._spatial(x))
        if memory is None:
            raise ValueError("this block attends to past frames, but was given no memory")
        memory = memory.newest(self.memory_len)
        past = torch.stack(memory.level(MAIN), dim=1)
        valid = nn.functional.pad(memory.valid, (0, 1), value=True)
        run = {"cc3d_full": self._full, "cc_separable": self._separable, "cc_query": self._query}[self.mode]
        return BlockOutput(run(x, past, valid))

    def _spatial(self, x: Tensor) -> Tensor:
        step = self.space
        for _ in range(self.recurrence):
            x = step.gamma * criss_cross(step.to_query(x), step.to_key(x), step.to_value(x)) + x
        return x

    def _full(self, x: Tensor, past: Tensor, valid: Tensor) -> Tensor:
        step = self.space
        clip = torch.cat([past, x[:, None]], dim=1)
        for _ in range(self.recurrence):
            q, k, v = (step.frames(conv, clip) for conv in (step.to_query, step.to_key, step.to_value))
            clip = step.gamma * criss_cross_3d(q, k, v, valid) + clip
        return clip[:, -1]

    def _separable(self, x: Tensor, past: Tensor, valid: Tensor) -> Tensor:
        x = self._spatial(x)
        step = self.time
        assert step is not None
        clip = torch.cat([past, x[:, None]], dim=1)
        key, value = step.frames(step.to_key, clip), step.frames(step.to_value, clip)
        return step.gamma * time_column(step.to_query(x), key, value, valid) + x

    def _query(self, x: Tensor, past: Tensor, valid: Tensor) -> Tensor:
        step = self.space
        key, value = step.frames(step.to_key, past), step.frames(step.to_value, past)
        for _ in range(self.recurrence):
            keys = torch.cat([key, step.to_key(x)[:, None]], dim=1)
            values = torch.cat([value, step.to_value(x)[:, None]], dim=1)
            x = step.gamma * criss_cross_query(step.to_query(x), keys, values, valid) + x
        return x


@block_type("cc")
def build_cc(inputs: BlockInputs) -> ContextBlock:
    """Criss-cross head: attention of ``MODE`` and recurrence ``R`` between 3x3 convolutions."""
    options = inputs.options
    mode = inputs.choice("MODE", MODES)
    inner = CrissCross(options.CHANNELS, mode, options.R, inputs.memory_length)
    return Surrounded(inputs.channels(), inner, options.CHANNELS, inputs.norm)
