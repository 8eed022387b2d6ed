"""Sliding windows: runs a segmentor on parts of an input that is too large for it.

Axes: T frames, K classes, H W size of the network input, h w size of a score map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from the_mask.data.clips import Clip
from the_mask.modeling.stream import NO_HINTS, Around, Hints, StreamState

Box = tuple[int, int, int, int]


def window_starts(length: int, window: int, stride: int, cell: int) -> list[int]:
    """First pixels of the windows along one axis, all multiples of ``cell``, so that the windows' score cells coincide.

    The last window ends at the end of the axis; because of the rounding it may be up to ``cell - 1`` pixels shorter.
    """
    if length <= window:
        return [0]
    last = math.ceil((length - window) / cell) * cell
    step = max(stride // cell, 1) * cell
    return [*range(0, last, step), last]


def check_window(size: Sequence[int], stride: Sequence[int]) -> None:
    """Raise a ValueError unless both are two positive numbers and the stride leaves no gaps."""
    for name, pair in (("SIZE", size), ("STRIDE", stride)):
        if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
            raise ValueError(f"TEST.WINDOW.{name} {list(pair)}: expected [height, width], two whole numbers > 0")
    if stride[0] > size[0] or stride[1] > size[1]:
        raise ValueError(f"TEST.WINDOW.STRIDE {list(stride)} is larger than the window {list(size)} and leaves gaps")


class SlidingWindow(Around):
    """Wraps a segmentor, with the same interface (``step``, ``score_maps``, ``score_stride``).

    Scores of overlapping windows are averaged in float32 at score size; besides one window's forward pass, memory holds
    one score map. Every window is its own stream with its own state; priors are cropped like the frame.

    Args:
        model: a segmentor.
        size: (height, width) of a window, pixels of the network input.
        stride: step between windows; ``None`` is two thirds of ``size``. Rounded down to whole score cells.
        pad: pad inputs smaller than a window up to it with the mean colour, and cut the scores afterwards.

    Raises:
        ValueError: sizes that are not two positive numbers, or a stride larger than the window, which leaves gaps.
    """

    def __init__(self, model: Any, size: Sequence[int], stride: Sequence[int] | None = None, pad: bool = True) -> None:
        stride = list(stride) if stride else [max(side * 2 // 3, 1) for side in size]
        check_window(size, stride)
        self.model = model
        self.num_classes: int = model.num_classes
        self.size = (size[0], size[1])
        self.stride = (stride[0], stride[1])
        self.pad = pad

    @property
    def score_stride(self) -> int:
        """Input pixels per cell of the score maps."""
        return self.model.score_stride

    @property
    def size_divisibility(self) -> int:
        """Smallest side of an input."""
        return 1 if self.pad else self.model.size_divisibility

    @property
    def device(self) -> torch.device:
        """Where the scores are."""
        return self.model.device

    def eval(self) -> SlidingWindow:
        """Put the model in eval mode."""
        self.model.eval()
        return self

    def boxes(self, height: int, width: int) -> list[Box]:
        """(top, left, bottom, right) of the windows of an input, row by row."""
        cell = self.score_stride
        return [
            (top, left, min(top + self.size[0], height), min(left + self.size[1], width))
            for top in window_starts(height, self.size[0], self.stride[0], cell)
            for left in window_starts(width, self.size[1], self.stride[1], cell)
        ]

    def init_state(self) -> StreamState:
        """State before the first frame; it gets a state per window when the input's size is known."""
        return self.new_state(windows=[])

    def step(self, frame: Tensor, state: StreamState, hints: Hints = NO_HINTS) -> tuple[Tensor, StreamState]:
        """Segment the next frame, [3, H, W]; a prior is cropped like it.

        Returns:
            scores [K, ceil(H/stride), ceil(W/stride)] float32, and the new state.
        """
        height, width = frame.shape[-2:]
        state = self.continue_state(state, (height, width))
        boxes = self.boxes(height, width)
        before = state["windows"] or [self.model.init_state() for _ in boxes]
        after: list[StreamState] = []

        def windows() -> Iterator[Tensor]:
            for (top, left, bottom, right), window_state in zip(boxes, before, strict=True):
                pixels, own = self._padded(frame[:, top:bottom, left:right]), hints
                if hints.prior is not None:
                    part = hints.prior.crop(top, left, bottom - top, right - left)
                    own = replace(hints, prior=part.pad(*pixels.shape[-2:]))
                scores, window_state = self.model.step(pixels, window_state, own)
                after.append(window_state)
                yield scores

        scores = self._average(windows(), boxes, height, width)
        return scores, {**state, "seen": state["seen"] + 1, "windows": after}

    def score_maps(self, clips: Sequence[Clip]) -> list[Tensor]:
        """Scores of whole clips, [T, K, ceil(H/stride), ceil(W/stride)] each: all frames cropped by the same window."""
        return [self._clip_scores(clip) for clip in clips]

    def _clip_scores(self, clip: Clip) -> Tensor:
        height, width = clip.frame_size
        boxes = self.boxes(height, width)

        def windows() -> Iterator[Tensor]:
            for top, left, bottom, right in boxes:
                frames = [self._padded(frame[:, top:bottom, left:right]) for frame in clip.frames]
                yield self.model.score_maps([replace(clip, frames=frames)])[0]

        return self._average(windows(), boxes, height, width)

    def _padded(self, pixels: Tensor) -> Tensor:
        """Pad [3, H, W] to at least the window's size with the exact mean colour, which is 0 after normalisation."""
        below, right = self.size[0] - pixels.shape[-2], self.size[1] - pixels.shape[-1]
        if not self.pad or (below <= 0 and right <= 0):
            return pixels
        mean = self.model.pixel_mean.to(pixels.device)
        return F.pad(pixels.float() - mean, (0, max(right, 0), 0, max(below, 0))) + mean

    def _average(self, scores: Iterator[Tensor], boxes: Sequence[Box], height: int, width: int) -> Tensor:
        """Mean over windows of [..., h', w'] at the whole input's score size, in float32."""
        cell = self.score_stride
        rows, columns = math.ceil(height / cell), math.ceil(width / cell)
        total = count = None
        for (top, left, bottom, right), part in zip(boxes, scores, strict=True):
            if len(boxes) == 1:
                return part[..., :rows, :columns].float()
            if total is None:
                total = part.new_zeros((*part.shape[:-2], rows, columns), dtype=torch.float32)
                count = part.new_zeros((rows, columns), dtype=torch.float32)
            assert count is not None
            y, x = top // cell, left // cell
            y_end, x_end = math.ceil(bottom / cell), math.ceil(right / cell)
            total[..., y:y_end, x:x_end] += part[..., : y_end - y, : x_end - x]
            count[y:y_end, x:x_end] += 1
        assert total is not None
        assert count is not None
        return total.div_(count)
