"""Multi-stage inference: several passes over a frame, each with the masks of the previous pass as its prior.

"Memory Based Video Scene Parsing", section 4. Axes: K classes, H W size of the source frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import Tensor

from the_mask.config.keys.context import FRAMES
from the_mask.data.prior_masks import read_prior_mask
from the_mask.inference.merge import score_labels
from the_mask.inference.views import MultiView
from the_mask.modeling.pixel.context.prior_map import PriorMap
from the_mask.modeling.stream import NO_HINTS, FrameName, Hints, Stream, StreamState


class MaskFolder:
    """Masks stored by an earlier run, used in place of stage 0.

    Args:
        folder: holds ``<video>/<frame>.png`` with raw label values (``TEST.SAVE_PREDICTIONS``).
        label_table: raw PNG value -> train id.
    """

    def __init__(self, folder: str, label_table: Sequence[int]) -> None:
        self.folder = folder
        self.label_table = tuple(label_table)

    def read(self, name: FrameName | None, size: tuple[int, int]) -> Tensor:
        """Labels [H, W] of a frame named (video, frame).

        Raises:
            FileNotFoundError, ValueError: no name, no mask, or a mask of another size or class list; names the file.
        """
        if name is None:
            raise ValueError(
                f"TEST.STAGES.MASKS {self.folder}: masks are found by video and frame, which a camera lacks"
            )
        return torch.from_numpy(read_prior_mask(self.folder, *name, size, self.label_table).astype(np.int32))


class MultiStage(Stream):
    """Runs several passes per frame: stage 0 without a prior from outside, stage k with the masks of stage k-1.

    A frame costs ``count`` + 1 passes (``count`` with stored masks). The state holds the masks of one frame, as small
    integers, and each stage's own memory.

    Args:
        stream: a :class:`MultiView` with output "scores" around a model that reads a prior.
        count: number of stages after stage 0.
        frame: frame whose mask (of the previous stage) is the prior: "same_frame", or "previous_frame" (the first frame
            of a video then has no prior).
        masks: stored masks of stage 0.
        ignore_label: of stored masks.

    Raises:
        ValueError: count below 1, unknown names, or a model that reads no prior.
    """

    def __init__(
        self,
        stream: MultiView,
        count: int = 1,
        frame: str = "same_frame",
        masks: MaskFolder | None = None,
        ignore_label: int = 255,
    ) -> None:
        if count < 1:
            raise ValueError(f"TEST.STAGES.COUNT {count}: expected at least 1 (0 leaves stages out)")
        if frame not in FRAMES:
            raise ValueError(f"TEST.STAGES.FRAME {frame!r}: expected one of {', '.join(FRAMES)}")
        if not stream.reads_prior:
            raise ValueError(
                f"TEST.STAGES.COUNT {count}: the model reads no prior, so a further stage would repeat the first; it "
                "takes a block such as class_memory"
            )
        self.stream = stream
        self.num_classes = stream.num_classes
        self.count = count
        self.frame = frame
        self.masks = masks
        self.ignore_label = ignore_label

    @classmethod
    def from_config(cls, cfg: CfgNode, stream: MultiView) -> MultiStage:
        """Build from the keys of ``TEST.STAGES``.

        Raises:
            ValueError: see the class; or stored masks for several data sets.
        """
        stages, masks = cfg.TEST.STAGES, None
        if stages.MASKS:
            names = list(cfg.DATASETS.TEST)
            if len(names) != 1 or names[0] not in DatasetCatalog.list():
                raise ValueError(f"TEST.STAGES.MASKS are of one known data set, but DATASETS.TEST is {names}")
            masks = MaskFolder(stages.MASKS, MetadataCatalog.get(names[0]).label_table)
        ignore_label = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        return cls(stream, stages.COUNT, stages.FRAME, masks, ignore_label)

    @property
    def passes(self) -> int:
        """Number of model passes per frame."""
        return self.count + (self.masks is None)

    def init_state(self) -> StreamState:
        """State before a video: a stream state per pass, and the last frame's masks of stages 0 .. count-1."""
        return self.new_state(passes=[self.stream.init_state() for _ in range(self.passes)], masks=[])

    def check_state(self, state: StreamState) -> None:
        """See :class:`Stream`; the number of passes must match, too."""
        super().check_state(state)
        if len(state["passes"]) != self.passes:
            raise ValueError(f"a state of {len(state['passes'])} passes, but there are {self.passes}")

    def step(
        self, frame: np.ndarray | Tensor, state: StreamState, hints: Hints = NO_HINTS
    ) -> tuple[Tensor, StreamState]:
        """Segment the next frame, uint8 RGB [H, W, 3]; stored masks are found by its name.

        Returns:
            scores [K, H, W] float32 of the last stage, and the new state.

        Raises:
            ValueError: a state of another stream. Errors of the stream and of stored masks are passed on.
        """
        size = (frame.shape[0], frame.shape[1])
        state = self.continue_state(state, size)
        inner = list(state["passes"])
        if self.masks is not None:
            current = [self.masks.read(hints.name, size)]
        else:
            scores, inner[0] = self.stream.step(frame, inner[0], hints)
            current = [score_labels(scores)]
        for stage in range(1, self.count + 1):
            given = current if self.frame == "same_frame" else state["masks"]
            prior = self._prior(given[stage - 1]) if given else None
            index = stage - (self.masks is not None)
            scores, inner[index] = self.stream.step(frame, inner[index], replace(hints, prior=prior))
            current.append(score_labels(scores))
        return scores, {**state, "seen": state["seen"] + 1, "passes": inner, "masks": current[:-1]}

    def _prior(self, labels: Tensor) -> PriorMap:
        return PriorMap.from_labels(labels[None], self.num_classes, self.ignore_label)
