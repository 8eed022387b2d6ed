"""Multi-stage inference: further passes over a frame, each with the masks of the pass before as its prior.

"Memory Based Video Scene Parsing", section 4. Axes: K classes, H W size of the source frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import Tensor, nn

from the_mask.data.prior_masks import read_prior_mask
from the_mask.inference.merge import score_labels
from the_mask.inference.views import OUTPUTS, FrameName, ViewRunner
from the_mask.modeling.pixel.context.prior_map import PriorMap

StreamState = dict[str, Any]
FRAMES = ("same_frame", "previous_frame")


class MaskFolder:
    """Masks that another run has stored, in the place of stage 0.

    Args:
        folder: with ``<video>/<frame>.png`` of raw label values (``TEST.SAVE_PREDICTIONS``).
        label_table: raw PNG value -> train id.
    """

    def __init__(self, folder: str, label_table: Sequence[int]) -> None:
        self.folder = folder
        self.label_table = tuple(label_table)

    def read(self, name: FrameName | None, size: tuple[int, int]) -> Tensor:
        """Labels [H, W] of a frame called (video, frame).

        Raises:
            FileNotFoundError, ValueError: no name, no mask, or one of another size or class list; the file is named.
        """
        if name is None:
            raise ValueError(
                f"TEST.STAGES.MASKS {self.folder}: masks are found by video and frame, which a camera lacks"
            )
        return torch.from_numpy(read_prior_mask(self.folder, *name, size, self.label_table).astype(np.int32))


class StageRunner:
    """A stream of several passes per frame: stage 0 as the model does by itself, stage k with stage k-1's masks.

    Costs ``count`` + 1 passes (``count`` with stored masks). The masks of one frame are kept, as small integers, and
    every stage's own memory of features.

    Args:
        scorer: a ``ViewRunner`` with output "scores" around a model that reads a prior.
        count: stages after stage 0.
        frame: whose mask of the stage before is the prior: "same_frame", or "previous_frame" (the first frame of a
            video then has none, and the model does by itself).
        masks: stored masks of stage 0.
        ignore_label: of stored masks.
        output: "labels" or "scores".

    Raises:
        ValueError: count below 1, or unknown names.
    """

    uses_names = True

    def __init__(
        self,
        scorer: ViewRunner,
        count: int = 1,
        frame: str = "same_frame",
        masks: MaskFolder | None = None,
        ignore_label: int = 255,
        output: str = "labels",
    ) -> None:
        if count < 1:
            raise ValueError(f"TEST.STAGES.COUNT {count}: expected at least 1 (0 leaves the runner out)")
        if frame not in FRAMES:
            raise ValueError(f"TEST.STAGES.FRAME {frame!r}: expected one of {', '.join(FRAMES)}")
        if output not in OUTPUTS:
            raise ValueError(f"output is {output!r}; expected one of {', '.join(OUTPUTS)}")
        self.scorer = scorer
        self.count = count
        self.frame = frame
        self.masks = masks
        self.ignore_label = ignore_label
        self.output = output

    @classmethod
    def from_config(cls, cfg: CfgNode, scorer: ViewRunner, model: nn.Module) -> StageRunner:
        """Runner with the keys of ``TEST.STAGES``.

        Raises:
            ValueError: a model that reads no prior, or stored masks for several data sets.
        """
        if not any(getattr(module, "uses_prior", False) for module in model.modules()):
            raise ValueError(
                f"TEST.STAGES.COUNT {cfg.TEST.STAGES.COUNT}: the model reads no prior, so a further stage would repeat "
                "the first; it takes a block such as class_memory"
            )
        stages, masks = cfg.TEST.STAGES, None
        if stages.MASKS:
            names = list(cfg.DATASETS.TEST)
            if len(names) != 1 or names[0] not in DatasetCatalog.list():
                raise ValueError(f"TEST.STAGES.MASKS are of one known data set, but DATASETS.TEST is {names}")
            masks = MaskFolder(stages.MASKS, MetadataCatalog.get(names[0]).label_table)
        ignore_label = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        return cls(scorer, stages.COUNT, stages.FRAME, masks, ignore_label, output="scores")

    @property
    def num_classes(self) -> int:
        """K."""
        return self.scorer.num_classes

    def init_state(self) -> StreamState:
        """State before a video: the scorer's of every pass, and the last frame's masks of stages 0 .. count-1."""
        passes = self.count + (self.masks is None)
        return {"passes": [self.scorer.init_state() for _ in range(passes)], "masks": []}

    def step(
        self, frame: np.ndarray | Tensor, state: StreamState, name: FrameName | None = None
    ) -> tuple[Tensor, StreamState]:
        """Segment the next frame, uint8 RGB [H, W, 3], called ``name`` (video, frame).

        Returns:
            labels [H, W] on the CPU, or scores [K, H, W] float32 of the last stage; and the new state.

        Raises:
            ValueError: a foreign state; also what the scorer and stored masks raise.
        """
        passes = self.count + (self.masks is None)
        if not isinstance(state, dict) or len(state.get("passes", ())) != passes:
            raise ValueError("not a state of this StageRunner; make one with init_state()")
        before = [mask for mask in state["masks"] if tuple(mask.shape) == tuple(frame.shape[:2])]
        states = list(state["passes"])
        if self.masks is not None:
            current = [self.masks.read(name, (frame.shape[0], frame.shape[1]))]
        else:
            scores, states[0] = self.scorer.step(frame, states[0])
            current = [score_labels(scores)]
        for stage in range(1, self.count + 1):
            given = current if self.frame == "same_frame" else before
            prior = self._prior(given[stage - 1]) if given else None
            index = stage - (self.masks is not None)
            scores, states[index] = self.scorer.step(frame, states[index], prior=prior)
            current.append(score_labels(scores))
        result = current[-1] if self.output == "labels" else scores
        return result, {"passes": states, "masks": current[:-1]}

    def _prior(self, labels: Tensor) -> PriorMap:
        return PriorMap.from_labels(labels[None], self.num_classes, self.ignore_label)
