"""Views of a frame (scales, each also mirrored) and the mean of their scores: test-time augmentation.

Axes: T frames of a clip, K classes, H W size of the source frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from the_mask.data.augmentation import fit_size, resize_image, round_up
from the_mask.data.io import read_image
from the_mask.inference.merge import PARITIES, ScoreMean, check_merge, normalize_scores, score_labels
from the_mask.modeling.scores import resize_scores

Clip = Mapping[str, Any]
StreamState = dict[str, Any]
FrameName = tuple[str, str]
ROWS_PER_TILE = 64
OUTPUTS = ("labels", "scores")


@dataclass(frozen=True)
class View:
    """One look at a frame: scaled by ``scale`` relative to the test box, and mirrored or not."""

    scale: float = 1.0
    flip: bool = False


def make_views(scales: Sequence[float], flip: bool) -> list[View]:
    """All views: every scale, and with ``flip`` its mirror image after it.

    Raises:
        ValueError: no scales, or one that is not > 0.
    """
    if not scales or not all(scale > 0 for scale in scales):
        raise ValueError(f"TEST.VIEWS.SCALES {list(scales)}: expected at least one number, all > 0")
    return [View(float(scale), mirrored) for scale in scales for mirrored in ((False, True) if flip else (False,))]


class ViewRunner:
    """Averages a segmentor's scores over views; a stream (``init_state``, ``step``), and a predictor of clips.

    Each view is a stream of its own, with its own state (memories, priors). One view is in work at a time: beside its
    forward pass this holds the sum, one float32 map of the frame's size (for clips: T of them).

    Args:
        model: a segmentor, or a :class:`~the_mask.inference.window.WindowRunner`. It is put in eval mode.
        views: see :func:`make_views`.
        box: (long edge, short edge) that a frame of scale 1 fits in, as ``INPUT.TEST``; 0 does not limit.
        size_multiple: sides are then stretched up to a multiple of this.
        min_short_edge: shortest edge (pixels) of a view; 0 is the model's ``size_divisibility``.
        normalization, temperature, mean: how scores of views are merged, see :mod:`the_mask.inference.merge`.
        parity: "mmseg": views below ``min_short_edge`` are clamped to it, and every view passes a softmax.
        output: "labels" or "scores".

    Raises:
        ValueError: unknown names, or no views.
    """

    uses_names = True

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
    ) -> None:
        check_merge(normalization, mean, "TEST.VIEWS")
        if parity not in PARITIES:
            raise ValueError(f"TEST.VIEWS.PARITY {parity!r}: expected one of {', '.join(map(repr, PARITIES))}")
        if output not in OUTPUTS:
            raise ValueError(f"output is {output!r}; expected one of {', '.join(OUTPUTS)}")
        if not views:
            raise ValueError("a ViewRunner needs at least one view")
        self.model = model.eval()
        self.views = list(views)
        self.box = box
        self.size_multiple = size_multiple
        self.min_short_edge = min_short_edge
        self.parity = parity
        self.normalization = "softmax" if parity == "mmseg" else normalization
        self.temperature = temperature
        self.mean = mean
        self.output = output

    @classmethod
    def from_config(cls, cfg: CfgNode, model: Any, output: str = "labels") -> ViewRunner:
        """Runner with the keys of ``TEST.VIEWS`` and ``INPUT.TEST``."""
        views = cfg.TEST.VIEWS
        return cls(
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
    def num_classes(self) -> int:
        """K."""
        return self.model.num_classes

    def view_size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        """Network input size of a frame at a scale.

        Raises:
            ValueError: shorter than the minimum (without parity).
        """
        size = fit_size(height, width, self.box, scale)
        least = self.min_short_edge or self.model.size_divisibility
        if min(size) < least:
            if self.parity != "mmseg":
                raise ValueError(
                    f"TEST.VIEWS.SCALES {scale:g} makes a {height}x{width} frame {size[0]}x{size[1]}, shorter than the "
                    f"minimum of {least} pixels (TEST.VIEWS.MIN_SHORT_EDGE, or the model's size divisibility); drop "
                    "this scale, or set TEST.VIEWS.PARITY mmseg to clamp it as the papers' code does"
                )
            size = fit_size(height, width, (0, least))
        return round_up(size, self.size_multiple)

    def init_state(self) -> StreamState:
        """State before a video: size of its frames, ``resets``, and the model's own state per view."""
        return {"size": [], "resets": 0, "views": [self.model.init_state() for _ in self.views]}

    def step(
        self, frame: np.ndarray | Tensor, state: StreamState, name: FrameName | None = None, prior: Any = None
    ) -> tuple[Tensor, StreamState]:
        """Segment the next frame.

        Args:
            frame: uint8 RGB [H, W, 3]. Another size than the last one's starts the stream anew.
            state: of :meth:`init_state` or the last step; not changed.
            name: not used here.
            prior: a ``PriorMap`` of one frame, or None; it is resized and mirrored like the frame.

        Returns:
            labels [H, W] on the CPU, or scores [K, H, W] float32 on the model's device; and the new state.

        Raises:
            ValueError: not a uint8 RGB frame, a foreign state, or a scale below the minimum.
        """
        image = as_image(frame)
        if not isinstance(state, dict) or set(state) != {"size", "resets", "views"}:
            raise ValueError("not a state of ViewRunner; make one with init_state()")
        if len(state["views"]) != len(self.views):
            raise ValueError(f"a state of {len(state['views'])} views, but there are {len(self.views)}")
        height, width = image.shape[:2]
        changed = bool(state["size"]) and state["size"] != [height, width]
        old = [self.model.init_state() for _ in self.views] if changed else state["views"]
        total = ScoreMean(self.mean)
        states = []
        for view, view_state in zip(self.views, old, strict=True):
            size = self.view_size(height, width, view.scale)
            pixels = _pixels(image, size, view.flip)
            extra = {}
            if prior is not None:
                moved = prior.resize(*size)
                extra["prior"] = moved.flip() if view.flip else moved
            scores, view_state = self.model.step(pixels, view_state, **extra)
            states.append(view_state)
            self._add(total, scores, view, size, (height, width))
            del scores
        merged = total.result()
        state = {"size": [height, width], "resets": state["resets"] + changed, "views": states}
        return (score_labels(merged) if self.output == "labels" else merged), state

    def clip_scores(self, clip: Clip) -> list[Tensor]:
        """Scores [K, height, width] of the frames of a test clip.

        Views of another size than the clip's frames are made from the files, not from the resized frames.
        """
        height, width = clip["height"], clip["width"]
        totals = [ScoreMean(self.mean) for _ in clip["frames"]]
        images: list[np.ndarray] | None = None
        for view in self.views:
            size = self.view_size(height, width, view.scale)
            if size == tuple(clip["frames"][0].shape[-2:]):
                frames = [frame.flip(-1) if view.flip else frame for frame in clip["frames"]]
            else:
                images = images or [read_image(name) for name in clip["file_names"]]
                frames = [_pixels(image, size, view.flip) for image in images]
            (scores,) = self.model.score_maps([{**clip, "frames": frames}])
            for total, frame_scores in zip(totals, scores, strict=True):
                self._add(total, frame_scores, view, size, (height, width))
            del scores, frame_scores
        return [total.result() for total in totals]

    def predict(self, clips: Sequence[Clip]) -> list[list[Tensor]]:
        """Label maps [height, width] of the frames of test clips."""
        return [[score_labels(scores) for scores in self.clip_scores(clip)] for clip in clips]

    def _add(
        self, total: ScoreMean, scores: Tensor, view: View, size: tuple[int, int], frame_size: tuple[int, int]
    ) -> None:
        """Resize a view's scores to the frame, turn them back, normalise, and add them, rows at a time."""
        stride = self.model.score_stride
        # Turned back on the cells where these end with the frame: then a mirror-symmetric model gives the same bits.
        on_cells = view.flip and size[1] % stride == 0
        if on_cells:
            scores = scores.flip(-1)
        height, width = frame_size
        total.start(scores.shape[0], height, width, scores.device)
        for rows in tiles(height):
            part = resize_scores(scores, size, frame_size, stride, rows)
            if view.flip and not on_cells:
                part = part.flip(-1)
            total.add_rows(rows, normalize_scores(part, self.normalization, self.temperature))


def tiles(height: int, rows: int = ROWS_PER_TILE) -> Iterable[slice]:
    """Slices of at most ``rows`` rows that cover ``height``."""
    return [slice(start, min(start + rows, height)) for start in range(0, height, rows)]


def as_image(frame: np.ndarray | Tensor) -> np.ndarray:
    """A frame as a NumPy array; a ValueError unless it is uint8 RGB [H, W, 3]."""
    image = frame.cpu().numpy() if isinstance(frame, Tensor) else frame
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"a frame is uint8 RGB [H, W, 3], got {image.dtype} {list(image.shape)}")
    return image


def _pixels(image: np.ndarray, size: tuple[int, int], flip: bool) -> Tensor:
    """uint8 [3, h, w] of a resized and perhaps mirrored frame."""
    pixels = torch.from_numpy(np.ascontiguousarray(resize_image(image, size).transpose(2, 0, 1)))
    return pixels.flip(-1) if flip else pixels
