"""Mask classification on clips: Mask2Former (clips of one frame) and THE-Mask.

Axes: B clips, T frames, Q queries, K classes, C channels, H W size of the network input, h w mask size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone, build_sem_seg_head
from torch import Tensor, nn

from the_mask.config.keys.mask_former import MaskOptions
from the_mask.data.clips import Clip
from the_mask.modeling.freezing import freeze_except
from the_mask.modeling.mask.criterion import MaskCriterion
from the_mask.modeling.mask.head import MaskClassificationHead
from the_mask.modeling.mask.mask_decoders.base import Predictions
from the_mask.modeling.mask.targets import build_targets
from the_mask.modeling.scores import clip_scores, query_maps
from the_mask.modeling.segmentor import Segmentor, check_finite
from the_mask.modeling.stream import NO_HINTS, Hints, Ring, StreamState


@META_ARCH_REGISTRY.register()
class MaskClassifier(Segmentor):
    """Backbone, pixel decoder and mask decoder; losses in training, score maps and label maps in eval mode.

    State-dict keys are those of the official Detectron2 Mask2Former: ``backbone``, ``sem_seg_head.pixel_decoder``,
    ``sem_seg_head.predictor``, ``criterion.empty_weight``.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: MaskClassificationHead,
        criterion: MaskCriterion,
        options: MaskOptions = MaskOptions(),
        clip_length: int = 1,
        clip_stride: int = 1,
        **shared: Any,
    ) -> None:
        """``clip_length`` and ``clip_stride`` are for streams; ``shared`` are the arguments of :class:`Segmentor`."""
        least = math.lcm(max(options.size_divisibility, 1), max(backbone.size_divisibility, 1))
        super().__init__(size_divisibility=least, **shared)
        if clip_length < 1 or clip_stride < 1:
            raise ValueError(f"TEST.CLIP_LENGTH ({clip_length}) and TEST.CLIP_STRIDE ({clip_stride}) must be >= 1")
        self.backbone: Backbone = backbone
        self.sem_seg_head: MaskClassificationHead = sem_seg_head
        self.criterion = criterion
        self.options = options
        self.ring = Ring(clip_length, clip_stride)
        freeze_except(self, self.trainable)
        self.train()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone = build_backbone(cfg)
        return {
            **super().from_config(cfg),
            "backbone": backbone,
            "sem_seg_head": build_sem_seg_head(cfg, backbone.output_shape()),
            "criterion": MaskCriterion(cfg),
            "options": MaskOptions.from_config(cfg),
            "clip_length": cfg.TEST.CLIP_LENGTH,
            "clip_stride": cfg.TEST.CLIP_STRIDE,
        }

    @property
    def score_stride(self) -> int:
        """Input pixels per cell of the score maps."""
        return self.sem_seg_head.pixel_decoder.mask_stride // self._enlarge

    @property
    def _enlarge(self) -> int:
        """Score cells per mask cell, along each side."""
        return self.sem_seg_head.pixel_decoder.mask_stride if self.options.merge_at == "input" else 1

    def runtime_parts(self) -> list[tuple[nn.Module, str]]:
        """The three networks separately, because deformable attention is faster here than in graph runtimes."""
        return [(self, "backbone"), (self.sem_seg_head, "pixel_decoder"), (self.sem_seg_head, "predictor")]

    def losses(self, clips: Sequence[Clip]) -> dict[str, Tensor]:
        """Weighted training losses of a batch of clips, in either mode."""
        images, frames = self.stack(clips)
        outputs = self.sem_seg_head(self.backbone(images), frames, aux=self.options.deep_supervision)
        size = (images.shape[-2], images.shape[-1])
        targets = build_targets(clips, self.ignore_label, self.num_classes, size, self.device)
        return self.criterion(outputs, targets, [clip.seed for clip in clips], self.iteration)

    def group_scores(self, images: Tensor, num_frames: int) -> Iterator[Tensor]:
        """Scores of a group of equal clips, one clip at a time; see :class:`Segmentor`."""
        outputs = self.sem_seg_head(self.backbone(images), num_frames)
        for row in range(len(images) // num_frames):
            yield clip_scores(outputs, row, self.options.clip_score_weight, enlarge=self._enlarge)

    @property
    def looks_back(self) -> bool:
        """Whether clips are longer than one frame."""
        return self.ring.frames > 1

    @property
    def has_queries(self) -> bool:
        """Whether scores are sums over queries: MERGE_AT mask."""
        return self.options.merge_at == "mask"

    def init_state(self) -> StreamState:
        """State before the first frame.

        Its ``ring`` has ``{"mask_features": [1,C,h,w], "maps": [[1,C_l,h_l,w_l], ...]}`` per kept frame, oldest first.
        """
        return self.new_state(ring=[])

    @torch.no_grad()
    def step(self, frame: Tensor, state: StreamState, hints: Hints = NO_HINTS) -> tuple[Tensor, StreamState]:
        """Segment the newest frame of a stream, with the frames before it as context; see :class:`Segmentor`.

        The window is the last ``clip_length`` frames, ``clip_stride`` apart, or as many as were seen. Backbone and
        pixel decoder run once per frame, on the new one; the rest comes from the state. The result is that of
        :meth:`score_maps` for the last frame of the same window.
        """
        self.check_hints(hints)
        outputs, state = self._advance(frame, state)
        return self._frame_scores(outputs, frame, state), state

    @torch.no_grad()
    def step_queries(self, frame: Tensor, state: StreamState) -> tuple[Tensor, Tensor, Tensor, StreamState]:
        """As :meth:`step`, with the queries behind the scores; see :class:`Segmentor`.

        With a frame branch, they are the weighted queries of both branches.

        Raises:
            ValueError: ``MODEL.MASK_FORMER.MERGE_AT`` is input, so scores are not a sum over queries.
        """
        if self.options.merge_at == "input":
            raise ValueError("masks of queries cannot be carried with MODEL.MASK_FORMER.MERGE_AT input: set it to mask")
        outputs, state = self._advance(frame, state)
        classes, masks = query_maps(outputs, 0, self.options.clip_score_weight)
        masks = self.crop_scores(masks, frame.shape[-2], frame.shape[-1])
        return self._frame_scores(outputs, frame, state), classes, masks, state

    def _frame_scores(self, outputs: Predictions, frame: Tensor, state: StreamState) -> Tensor:
        """Scores of the newest frame of a stream."""
        scores = clip_scores(outputs, 0, self.options.clip_score_weight, enlarge=self._enlarge)[-1]
        scores = self.crop_scores(scores, frame.shape[-2], frame.shape[-1])
        check_finite(scores, f"frame {state['seen'] - 1} of a stream", ())
        return scores

    def _advance(self, frame: Tensor, state: StreamState) -> tuple[Predictions, StreamState]:
        """Predictions for the newest frame of a stream, and the new state."""
        state = self.continue_state(state, frame.shape[-2:])
        images, _ = self.stack([Clip([frame])])
        mask_features, maps = self.sem_seg_head.pixel_decoder(self.backbone(images))
        entries = self.ring.push(state["ring"], {"mask_features": mask_features, "maps": list(maps)})
        kept = self.ring.read(entries)
        outputs = self.sem_seg_head.predictor(
            [torch.cat(level) for level in zip(*(entry["maps"] for entry in kept), strict=True)],
            torch.cat([entry["mask_features"] for entry in kept]),
            len(kept),
            last_frame_only=True,
        )
        return outputs, {**state, "seen": state["seen"] + 1, "ring": entries}
