"""Views of a frame (scales, each also mirrored) and the mean of their scores: test-time augmentation.

One plain view is plain streaming. Axes: T frames of a clip, K classes, H W size of the source frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from the_mask.data.augmentation import fit_size, resize_image, round_up
from the_mask.data.clips import Clip
from the_mask.data.io import read_image
from the_mask.inference.merge import PARITIES, ScoreMean, check_merge, normalize_scores, score_labels
from the_mask.modeling.scores import label_map, resize_scores
from the_mask.modeling.stream import NO_HINTS, Around, Hints, StreamState

# (network inputs, the model's states, hints) -> (scores, the model's new states), as ``Stream.step_many``.
Advance = Callable[[list[Tensor], list[StreamState], Sequence[Hints]], tuple[list[Tensor], list[StreamState]]]
ROWS_PER_TILE = 64
OUTPUTS = ("labels", "scores")
OUTPUT_STRIDES = (1, 4, 8)


@dataclass(frozen=True)
class View:
    """One view of a frame: scaled by ``scale`` relative to the test box, and optionally mirrored."""

    scale: float = 1.0
    flip: bool = False


def make_views(scales: Sequence[float], flip: bool) -> list[View]:
    """All views: every scale and, with ``flip``, its mirror image after it.

    Raises:
        ValueError: no scales, or one that is not > 0.
    """
    if not scales or not all(scale > 0 for scale in scales):
        raise ValueError(f"TEST.VIEWS.SCALES {list(scales)}: expected at least one number, all > 0")
    return [View(float(scale), mirrored) for scale in scales for mirrored in ((False, True) if flip else (False,))]


class MultiView(Around):
    """Averages a segmentor's scores over views of a frame; also predicts clips.

    Each view is its own stream, whose state (memories, priors) is in the state's ``views``. Views run one at a time:
    besides the forward pass, memory holds the sum, one float32 map of the result's size (for clips: T of them). A
    single plain view needs no sum: its label maps are made row by row, without a full-size score map.

    Args:
        model: a segmentor, or a :class:`~the_mask.inference.window.SlidingWindow`. It is put in eval mode.
        views: see :func:`make_views`.
        box: (long edge, short edge) that a frame of scale 1 fits in, as ``INPUT.TEST``; 0 does not limit.
        size_multiple: sides are then rounded up to a multiple of this.
        min_short_edge: shortest edge (pixels) of a view; 0 is the model's ``size_divisibility`` for scaled views.
        normalization, temperature, mean: how scores of views are merged, see :mod:`the_mask.inference.merge`.
        parity: "mmseg": views below ``min_short_edge`` are clamped to it, and every view passes a softmax.
        output: "labels" or "scores".
        output_stride: 1 gives results at the size of the frame, 4 and 8 at a quarter and an eighth of it.

    Raises:
        ValueError: unknown names, or no views.
    """

    def __init__(
        self,
        model: Any,
        views: Sequence[View] = (View(),),
        *,
        box: tuple[int, int] = (0, 0),
        size_multiple: int = 1,
        min_short_edge: int = 0,
        normalization: str = "none",
        temperature: float = 1.0,
        mean: str = "arithmetic",
        parity: str = "",
        output: str = "labels",
        output_stride: int = 1,
    ) -> None:
        check_merge(normalization, mean, "TEST.VIEWS")
        if parity not in PARITIES:
            raise ValueError(f"TEST.VIEWS.PARITY {parity!r}: expected one of {', '.join(map(repr, PARITIES))}")
        check_output(output, output_stride)
        if not views:
            raise ValueError("MultiView needs at least one view")
        self.model = model.eval()
        self.num_classes: int = model.num_classes
        self.views = list(views)
        self.box = box
        self.size_multiple = size_multiple
        self.min_short_edge = min_short_edge
        self.parity = parity
        self.normalization = "softmax" if parity == "mmseg" else normalization
        self.temperature = temperature
        self.mean = mean
        self.output = output
        self.output_stride = output_stride
        # There is nothing to merge.
        self.is_single = len(self.views) == 1 and not self.views[0].flip
        self.is_single &= self.normalization == "none" and mean == "arithmetic"

    @classmethod
    def from_config(cls, cfg: CfgNode, model: Any, output: str = "labels") -> MultiView:
        """Build from the keys of ``TEST.VIEWS`` and ``INPUT.TEST``."""
        views = cfg.TEST.VIEWS
        return MultiView(
            model,
            make_views(views.SCALES, views.FLIP),
            box=(cfg.INPUT.TEST.LONG_EDGE, cfg.INPUT.TEST.SHORT_EDGE),
            size_multiple=cfg.INPUT.TEST.SIZE_MULTIPLE,
            min_short_edge=views.MIN_SHORT_EDGE,
            normalization=views.NORMALIZE,
            temperature=views.TEMPERATURE,
            mean=views.MEAN,
            parity=views.PARITY,
            output=output,
        )

    @property
    def keyframe_interval(self) -> int:
        """That of the model."""
        return self.model.keyframe_interval

    def is_keyframe(self, state: StreamState) -> bool | None:
        """The model's answer for the first view."""
        return self.model.is_keyframe(state["views"][0])

    def network_size(self, height: int, width: int, scale: float = 1.0) -> tuple[int, int]:
        """Network input size of a frame at a scale, as in the clip mapper: fitted, then both sides rounded up.

        Raises:
            ValueError: shorter than the minimum (without parity).
        """
        size = fit_size(height, width, self.box, scale)
        # An unscaled frame is padded as usual.
        least = self.min_short_edge or (self.model.size_divisibility if scale != 1 or self.parity else 1)
        if min(size) < least:
            if self.parity != "mmseg":
                raise ValueError(
                    f"TEST.VIEWS.SCALES {scale:g} makes a {height}x{width} frame {size[0]}x{size[1]}, shorter than the "
                    f"minimum of {least} pixels (TEST.VIEWS.MIN_SHORT_EDGE, or the model's size divisibility); drop "
                    "this scale, or set TEST.VIEWS.PARITY mmseg to clamp it as the papers' code does"
                )
            size = fit_size(height, width, (0, least))
        return round_up(size, self.size_multiple)

    def prepare(self, frame: np.ndarray | Tensor, view: View = View()) -> Tensor:
        """Resize a uint8 RGB frame [H, W, 3] to the network size: uint8 [3, h, w].

        Raises:
            ValueError: a frame of another form.
        """
        image = as_image(frame)
        pixels = resize_image(image, self.network_size(image.shape[0], image.shape[1], view.scale))
        found = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return found.flip(-1) if view.flip else found

    def finish(self, scores: Tensor, network_size: tuple[int, int], frame_size: tuple[int, int]) -> Tensor:
        """Turn a single view's scores into the result of :meth:`step`; labels are made without a full-size score map.

        Args:
            scores: [K, h, w] at the model's ``score_stride``.
            network_size, frame_size: (height, width) of the prepared and of the source frame.
        """
        function = label_map if self.output == "labels" else resize_scores
        return function(scores, network_size, self._result_size(frame_size), self.model.score_stride)

    def init_state(self) -> StreamState:
        """State before a video."""
        return self.new_state(views=[self.model.init_state() for _ in self.views])

    def check_state(self, state: StreamState) -> None:
        """See :class:`Stream`; the number of views must match, too."""
        super().check_state(state)
        if len(state["views"]) != len(self.views):
            raise ValueError(f"a state of {len(state['views'])} views, but there are {len(self.views)}")

    def step(
        self, frame: np.ndarray | Tensor, state: StreamState, hints: Hints = NO_HINTS
    ) -> tuple[Tensor, StreamState]:
        """Segment the next frame.

        Args:
            frame: uint8 RGB [H, W, 3]. A frame of another size than the last one resets the stream, which is
                counted in ``state["resets"]``.
            state: of :meth:`init_state` or the last step; not changed.
            hints: a prior is resized and mirrored like the frame.

        Returns:
            labels: uint8 (int32 with more than 255 classes) [H, W] on the CPU; or scores: [K, H, W] float32 on the
            model's device; with an ``output_stride`` s [ceil(H/s), ceil(W/s)]; and the new state.

        Raises:
            ValueError: not a uint8 RGB frame, a state of another stream, a scale below the minimum, or scores that are
                not finite.
        """
        image = as_image(frame)
        frame_size = (image.shape[0], image.shape[1])
        state = self.continue_state(state, frame_size)
        total, inner = ScoreMean(self.mean), []
        for view, view_state in zip(self.views, state["views"], strict=True):
            pixels = self.prepare(image, view)
            size = (pixels.shape[1], pixels.shape[2])
            scores, view_state = self.model.step(pixels, view_state, _view_hints(hints, view, size))
            inner.append(view_state)
            if not self.is_single:
                self._add(total, scores, view, size, self._result_size(frame_size))
                del scores
        state = {**state, "seen": state["seen"] + 1, "views": inner}
        if self.is_single:
            return self.finish(scores, size, frame_size), state
        merged = total.result()
        return (score_labels(merged) if self.output == "labels" else merged), state

    def step_many(
        self,
        frames: Sequence[np.ndarray | Tensor],
        states: Sequence[StreamState],
        hints: Sequence[Hints] | None = None,
        advance: Advance | None = None,
    ) -> tuple[list[Tensor], list[StreamState]]:
        """As :meth:`step` for several streams; with a single view, they are batched.

        Args:
            frames, states, hints: see :meth:`step`.
            advance: runs the model; its ``step_many`` by default. Only for a single view.
        """
        if not self.is_single:
            assert advance is None, "several views are not advanced by others"
            return super().step_many(frames, states, hints)
        hints = [NO_HINTS] * len(frames) if hints is None else hints
        (view,) = self.views
        images = [as_image(frame) for frame in frames]
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        states = [self.continue_state(state, size) for state, size in zip(states, sizes, strict=True)]
        pixels = [self.prepare(image, view) for image in images]
        networks = [(x.shape[1], x.shape[2]) for x in pixels]
        inner_hints = [_view_hints(hint, view, size) for hint, size in zip(hints, networks, strict=True)]
        scores, inner = (advance or self.model.step_many)(pixels, [s["views"][0] for s in states], inner_hints)
        outputs = [self.finish(*arguments) for arguments in zip(scores, networks, sizes, strict=True)]
        return outputs, [
            {**state, "seen": state["seen"] + 1, "views": [own]} for state, own in zip(states, inner, strict=True)
        ]

    def clip_scores(self, clip: Clip) -> list[Tensor]:
        """Scores [K, height, width] of the frames of a test clip.

        Views of another size than the clip's frames are made from the files, not from the resized frames.
        """
        height, width = clip.output_size
        totals = [ScoreMean(self.mean) for _ in clip.frames]
        images: list[np.ndarray] | None = None
        for view in self.views:
            size = self.network_size(height, width, view.scale)
            if size == clip.frame_size:
                frames = [frame.flip(-1) if view.flip else frame for frame in clip.frames]
            else:
                images = images or [read_image(name) for name in clip.file_names]
                frames = [self.prepare(image, view) for image in images]
            (scores,) = self.model.score_maps([replace(clip, frames=frames)])
            for total, frame_scores in zip(totals, scores, strict=True):
                self._add(total, frame_scores, view, size, (height, width))
            del scores, frame_scores
        return [total.result() for total in totals]

    def predict(self, clips: Sequence[Clip]) -> list[list[Tensor]]:
        """Label maps [height, width] of the frames of test clips."""
        return [[score_labels(scores) for scores in self.clip_scores(clip)] for clip in clips]

    def _result_size(self, frame_size: tuple[int, int]) -> tuple[int, int]:
        height, width = (math.ceil(side / self.output_stride) for side in frame_size)
        return height, width

    def _add(
        self, total: ScoreMean, scores: Tensor, view: View, size: tuple[int, int], result_size: tuple[int, int]
    ) -> None:
        """Resize a view's scores to the result, undo mirroring, normalise, and add them, some rows at a time."""
        stride = self.model.score_stride
        # Undo mirroring on the cells if they end with the frame: then a mirror-symmetric model gives bit-equal results.
        on_cells = view.flip and size[1] % stride == 0
        if on_cells:
            scores = scores.flip(-1)
        height, width = result_size
        total.start(scores.shape[0], height, width, scores.device)
        for rows in tiles(height):
            part = resize_scores(scores, size, result_size, stride, rows)
            if view.flip and not on_cells:
                part = part.flip(-1)
            total.add_rows(rows, normalize_scores(part, self.normalization, self.temperature))


def check_output(output: str, output_stride: int) -> None:
    """Raise a ValueError for unknown values."""
    if output not in OUTPUTS:
        raise ValueError(f"output is {output!r}; expected one of {', '.join(OUTPUTS)}")
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"output_stride is {output_stride}; expected one of {', '.join(map(str, OUTPUT_STRIDES))}")


def tiles(height: int, rows: int = ROWS_PER_TILE) -> Iterable[slice]:
    """Slices of at most ``rows`` rows that cover ``height``."""
    return [slice(start, min(start + rows, height)) for start in range(0, height, rows)]


def as_image(frame: np.ndarray | Tensor) -> np.ndarray:
    """A frame as a NumPy array; a ValueError unless it is uint8 RGB [H, W, 3]."""
    image = frame.cpu().numpy() if isinstance(frame, Tensor) else frame
    if not isinstance(image, np.ndarray):
        raise ValueError(f"a frame is uint8 RGB [H, W, 3], got {type(frame).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"a frame is uint8 RGB [H, W, 3], got {image.dtype} {list(image.shape)}")
    return image


def _view_hints(hints: Hints, view: View, size: tuple[int, int]) -> Hints:
    """Hints for a view at its network size."""
    if hints.prior is None:
        return hints
    prior = hints.prior.resize(*size)
    return replace(hints, prior=prior.flip() if view.flip else prior)
