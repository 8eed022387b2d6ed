"""The prior providers of models with a class memory, by the value of ``MODEL.CONTEXT.PRIOR``.

While the ground truth replaces a prior, it is passed on as labels, without a softmax. Axes: B clips, K
classes, H W size of the network input, h w size of a score map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from detectron2.config import CfgNode
from torch import Tensor

from the_mask.modeling.freezing import evaluation_mode
from the_mask.modeling.pixel.context.prior_providers import PriorProvider, prior_provider
from the_mask.modeling.pixel.context.types import PriorMap, TrainBatch

if TYPE_CHECKING:
    from the_mask.modeling.pixel.clip_segmentor import ClipSegmentor

SAME_FRAME, PREVIOUS_FRAME = "same_frame", "previous_frame"
FRAMES = (SAME_FRAME, PREVIOUS_FRAME)


class Stage1Prior(PriorProvider):
    """No prior from outside: the block's own first classifier gives that of the current frame (decoder B)."""

    # The frame whose ground truth is used during the warm-up.
    truth_of = SAME_FRAME


class PreviousPrediction(PriorProvider):
    """The model's prediction for the previous frame (decoder A); unknown for the first frame of a video.

    In training, the model runs once more on the previous frame, in eval mode and without gradient. The frame comes from
    the same clip, so it has the same crop and flip; its own prior is that of its first classifier.

    Args:
        soft: keep probabilities (float16 in a stream) instead of labels.
    """

    past_frames = 1
    truth_of = PREVIOUS_FRAME

    def __init__(self, soft: bool = False) -> None:
        self.soft = soft

    def for_training(self, model: ClipSegmentor, batch: TrainBatch) -> PriorMap | None:
        earlier = TrainBatch(batch.clips, batch.images[:, :-1], batch.labels, batch.valid[:, :-1])
        with torch.no_grad(), evaluation_mode(model):
            _, output = model.clip_output(earlier)
        prior = PriorMap.from_logits(output.logits, model.ignore_label)
        assert prior.probabilities is not None
        exists = batch.valid[:, -1, None, None]
        if self.soft:
            return PriorMap.from_probabilities(prior.probabilities * exists[:, None], model.ignore_label)
        labels = prior.probabilities.argmax(dim=1).where(exists, model.ignore_label)
        return PriorMap(labels, None, model.num_classes, model.ignore_label)

    def for_frame(self, kept: dict[str, Any]) -> PriorMap | None:
        if "probabilities" in kept:
            return PriorMap.from_probabilities(kept["probabilities"].float())
        if "labels" in kept:
            return PriorMap(kept["labels"].long(), None, kept["classes"], kept["classes"])
        return None

    def after_frame(self, kept: dict[str, Any], scores: Tensor) -> dict[str, Any]:
        if self.soft:
            return {"probabilities": scores.half()}
        classes = scores.shape[1]
        return {"labels": scores.argmax(dim=1).to(torch.uint8 if classes <= 255 else torch.int32), "classes": classes}


class StoredMasks(PriorProvider):
    """Masks from an earlier run.

    In training those of ``INPUT.PRIOR_MASKS``, transformed with the clip by the loader; in a stream, ``MultiStage``
    passes them to ``step``.

    Args:
        frame: "same_frame" or "previous_frame".

    Raises:
        ValueError: unknown ``frame``.
    """

    def __init__(self, frame: str = SAME_FRAME) -> None:
        if frame not in FRAMES:
            raise ValueError(f"MODEL.CONTEXT.STORED_FRAME {frame!r}: expected one of {', '.join(FRAMES)}")
        self.truth_of = frame
        self.past_frames = 1 if frame == PREVIOUS_FRAME else 0

    def for_training(self, model: ClipSegmentor, batch: TrainBatch) -> PriorMap | None:
        for clip in batch.clips:
            if not clip.priors:
                raise ValueError("MODEL.CONTEXT.PRIOR stored_masks: the clips hold no masks; set INPUT.PRIOR_MASKS")
        return label_prior(model, batch, [clip.priors for clip in batch.clips], self.truth_of)


class GroundTruthWarmup(PriorProvider):
    """The ground truth for the first iterations, while predictions are still poor; then another provider.

    Args:
        then: the provider that takes over.
        iterations: number of iterations with the ground truth.
    """

    def __init__(self, then: Stage1Prior | PreviousPrediction | StoredMasks, iterations: int) -> None:
        self.then = then
        self.iterations = iterations
        self.past_frames = then.past_frames

    def for_training(self, model: ClipSegmentor, batch: TrainBatch) -> PriorMap | None:
        if model.iteration < self.iterations:
            return label_prior(model, batch, [clip.labels for clip in batch.clips], self.then.truth_of)
        return self.then.for_training(model, batch)

    def for_frame(self, kept: dict[str, Any]) -> PriorMap | None:
        return self.then.for_frame(kept)

    def after_frame(self, kept: dict[str, Any], scores: Tensor) -> dict[str, Any]:
        return self.then.after_frame(kept, scores)


def label_prior(
    model: ClipSegmentor, batch: TrainBatch, maps: Sequence[Sequence[Tensor | None]], frame: str
) -> PriorMap:
    """Hard prior from label maps of the clips; unknown for frames without one, or before the video's start.

    Args:
        model: with the classes.
        batch: its slots may be empty.
        maps: of every clip, a label map [H, W] or None per frame.
        frame: "same_frame" or "previous_frame".
    """
    size = (batch.images.shape[-2], batch.images.shape[-1])
    stacked = torch.full((len(batch.clips), *size), model.ignore_label, dtype=torch.int64)
    back = 1 if frame == SAME_FRAME else 2
    for row, clip_maps in enumerate(maps):
        exists = frame == SAME_FRAME or bool(batch.valid[row, -1])
        labels = clip_maps[-back] if exists and len(clip_maps) >= back else None
        if labels is not None:
            stacked[row, : labels.shape[0], : labels.shape[1]] = labels
    return PriorMap.from_labels(stacked.to(batch.images.device), model.num_classes, model.ignore_label)


def _warmed(cfg: CfgNode, then: Stage1Prior | PreviousPrediction | StoredMasks) -> PriorProvider:
    share = cfg.MODEL.CONTEXT.PRIOR_GT_WARMUP
    if not 0 <= share <= 1:
        raise ValueError(f"MODEL.CONTEXT.PRIOR_GT_WARMUP {share}: expected a share of the training in 0..1")
    return GroundTruthWarmup(then, round(share * cfg.SOLVER.MAX_ITER))


@prior_provider("stage1")
def _stage1(cfg: CfgNode) -> PriorProvider:
    return _warmed(cfg, Stage1Prior())


@prior_provider("previous_prediction")
def _previous_prediction(cfg: CfgNode) -> PriorProvider:
    return _warmed(cfg, PreviousPrediction(cfg.MODEL.CONTEXT.PRIOR_SOFT))


@prior_provider("stored_masks")
def _stored_masks(cfg: CfgNode) -> PriorProvider:
    return _warmed(cfg, StoredMasks(cfg.MODEL.CONTEXT.STORED_FRAME))
