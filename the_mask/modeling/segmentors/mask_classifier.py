"""Mask classification on clips: Mask2Former (clips of one frame) and THE-Mask.

Axes: B clips, T frames, Q queries, K classes, C channels, H W size of the network input, h w mask size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone, build_sem_seg_head
from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.modeling.criterion import MaskCriterion
from the_mask.modeling.segmentors import ring
from the_mask.modeling.segmentors.freezing import eval_frozen, freeze_except
from the_mask.modeling.segmentors.head import MaskClassificationHead
from the_mask.modeling.segmentors.ring import StreamState
from the_mask.modeling.segmentors.scores import clip_scores, label_map, resize_scores
from the_mask.modeling.targets import build_targets, clip_name

Clip = Mapping[str, Any]


@META_ARCH_REGISTRY.register()
class MaskClassifier(nn.Module):
    """Backbone, pixel decoder and mask decoder; losses in training, score maps and label maps in eval mode.

    State-dict keys are those of the official Detectron2 Mask2Former: ``backbone``, ``sem_seg_head.pixel_decoder``,
    ``sem_seg_head.predictor``, ``criterion.empty_weight``.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: MaskClassificationHead,
        criterion: MaskCriterion,
        num_classes: int,
        ignore_label: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisibility: int,
        deep_supervision: bool = True,
        clip_score_weight: float = 0.5,
        clip_length: int = 1,
        clip_stride: int = 1,
        trainable: Sequence[str] = (),
        frozen_eval: bool = True,
    ) -> None:
        """Args name the config keys; see :meth:`from_config`. ``clip_length`` and ``clip_stride`` are for streams."""
        super().__init__()
        if clip_length < 1 or clip_stride < 1:
            raise ValueError(f"TEST.CLIP_LENGTH ({clip_length}) and TEST.CLIP_STRIDE ({clip_stride}) must be >= 1")
        if not 0 <= clip_score_weight <= 1:
            raise ValueError(f"MODEL.THE_MASK.CLIP_SCORE_WEIGHT is {clip_score_weight}; expected 0..1")
        self.backbone: Backbone = backbone
        self.sem_seg_head: MaskClassificationHead = sem_seg_head
        self.criterion = criterion
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.size_divisibility = math.lcm(max(size_divisibility, 1), max(backbone.size_divisibility, 1))
        self.deep_supervision = deep_supervision
        self.clip_score_weight = clip_score_weight
        self.clip_length = clip_length
        self.clip_stride = clip_stride
        self.frozen_eval = frozen_eval
        self.iteration = 0
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        freeze_except(self, trainable)
        self.train()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "sem_seg_head": build_sem_seg_head(cfg, backbone.output_shape()),
            "criterion": MaskCriterion(cfg),
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "ignore_label": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "size_divisibility": cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY,
            "deep_supervision": cfg.MODEL.MASK_FORMER.DEEP_SUPERVISION,
            "clip_score_weight": cfg.MODEL.THE_MASK.CLIP_SCORE_WEIGHT,
            "clip_length": cfg.TEST.CLIP_LENGTH,
            "clip_stride": cfg.TEST.CLIP_STRIDE,
            "trainable": cfg.MODEL.THE_MASK.TRAINABLE,
            "frozen_eval": cfg.MODEL.THE_MASK.FROZEN_EVAL,
        }

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return self.pixel_mean.device

    @property
    def score_stride(self) -> int:
        """Input pixels per cell of the score maps."""
        return self.sem_seg_head.pixel_decoder.mask_stride

    def train(self, mode: bool = True) -> MaskClassifier:
        """Switch the mode; frozen parts stay in eval mode (``MODEL.THE_MASK.FROZEN_EVAL``)."""
        super().train(mode)
        if mode and self.frozen_eval:
            for child in self.children():
                eval_frozen(child)
        return self

    def set_iteration(self, iteration: int) -> None:
        """Tell the model the trainer's iteration; it drives the warm-up of the loss."""
        self.iteration = iteration

    def forward(self, clips: Sequence[Clip]) -> dict[str, Tensor] | list[dict[str, list[Tensor]]]:
        """Train: weighted losses by name. Eval: ``{"sem_seg": T tensors [K, height, width]}`` per clip.

        Args:
            clips: dicts of the clip mapper: ``frames`` (T tensors [3,H,W], RGB 0..255), in training also ``labels``
                and ``seed``, in eval mode ``height`` and ``width`` of the original frames (default: those of
                ``frames``). Training clips have one T; sizes may differ and are padded at the bottom and right.

        Raises:
            ValueError: clips that cannot be stacked, labels outside the classes, or scores that are not finite.
        """
        if self.training:
            return self.losses(clips)
        return [
            {"sem_seg": [resize_scores(s, _frame_size(clip), _output_size(clip), self.score_stride) for s in scores]}
            for clip, scores in zip(clips, self.score_maps(clips), strict=True)
        ]

    def losses(self, clips: Sequence[Clip]) -> dict[str, Tensor]:
        """Weighted training losses of a batch of clips, in either mode."""
        images, frames = self.stack(clips)
        outputs = self.sem_seg_head(self.backbone(images), frames, aux=self.deep_supervision)
        size = (images.shape[-2], images.shape[-1])
        targets = build_targets(clips, self.ignore_label, self.num_classes, size, self.device)
        return self.criterion(outputs, targets, [clip["seed"] for clip in clips], self.iteration)

    @torch.no_grad()
    def score_maps(self, clips: Sequence[Clip]) -> list[Tensor]:
        """Class scores per clip, [T, K, ceil(H/stride), ceil(W/stride)], float32 on the model's device.

        Clips of one length and size are run together, others apart, so a clip's scores do not depend on its batch.

        Raises:
            ValueError: scores that are not finite, naming the clip and its files.
        """
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, clip in enumerate(clips):
            groups[(len(clip["frames"]), *_frame_size(clip))].append(index)
        results: dict[int, Tensor] = {}
        for (frames, height, width), members in groups.items():
            images, _ = self.stack([clips[i] for i in members])
            outputs = self.sem_seg_head(self.backbone(images), frames)
            for row, index in enumerate(members):
                scores = self._crop(clip_scores(outputs, row, self.clip_score_weight), height, width)
                _check_finite(scores, clip_name(clips[index]), clips[index].get("file_names", ()))
                results[index] = scores
        return [results[i] for i in range(len(clips))]

    def predict(self, clips: Sequence[Clip]) -> list[list[Tensor]]:
        """Label maps per clip: T uint8 (int32 with more than 255 classes) tensors [height, width] on the CPU."""
        return [
            [label_map(s, _frame_size(clip), _output_size(clip), self.score_stride) for s in scores]
            for clip, scores in zip(clips, self.score_maps(clips), strict=True)
        ]

    def init_state(self) -> StreamState:
        """Return the state of a stream before its first frame; see :mod:`the_mask.modeling.segmentors.ring`."""
        return ring.empty_state()

    @torch.no_grad()
    def step(self, frame: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """Segment the newest frame of a stream, with the frames before it as context.

        The window is the last ``clip_length`` frames, ``clip_stride`` apart, or as many as were seen. Backbone and
        pixel decoder run once per frame, on the new one; the rest comes from the state. The result is that of
        :meth:`score_maps` for the last frame of the same window.

        Args:
            frame: [3, H, W], RGB 0..255. A size other than the last frame's starts the stream anew, counted in
                ``state["resets"]``.
            state: of :meth:`init_state` or the last step; not changed.

        Returns:
            scores [K, ceil(H/stride), ceil(W/stride)], and the new state.
        """
        images, _ = self.stack([{"frames": [frame]}])
        height, width = frame.shape[-2:]
        mask_features, maps = self.sem_seg_head.pixel_decoder(self.backbone(images))
        capacity = ring.reach(self.clip_length, self.clip_stride)
        state = ring.push(state, (height, width), mask_features, maps, capacity)
        kept = ring.window(state, self.clip_length, self.clip_stride)
        outputs = self.sem_seg_head.predictor(
            [torch.cat(level) for level in zip(*(entry["maps"] for entry in kept), strict=True)],
            torch.cat([entry["mask_features"] for entry in kept]),
            len(kept),
            last_frame_only=True,
        )
        scores = self._crop(clip_scores(outputs, 0, self.clip_score_weight), height, width)
        _check_finite(scores, f"frame {state['seen'] - 1} of a stream", ())
        return scores[0], state

    def stack(self, clips: Sequence[Clip]) -> tuple[Tensor, int]:
        """Move to the device, normalise and pad: [B*T, 3, H, W] with H, W multiples of ``size_divisibility``, and T.

        Padding is 0 after normalisation. Raises a ValueError unless clips have one length and frames one size.
        """
        lengths = {len(clip["frames"]) for clip in clips}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"a batch needs clips of one length >= 1, got lengths {sorted(lengths)}")
        sizes = [_frame_size(clip) for clip in clips]
        height, width = (
            math.ceil(max(side) / self.size_divisibility) * self.size_divisibility for side in zip(*sizes, strict=True)
        )
        images = []
        for clip in clips:
            frames = torch.stack(list(clip["frames"])).to(self.device, non_blocking=True)
            frames = (frames.float() - self.pixel_mean) / self.pixel_std
            images.append(F.pad(frames, (0, width - frames.shape[-1], 0, height - frames.shape[-2])))
        return torch.cat(images), lengths.pop()

    def _crop(self, scores: Tensor, height: int, width: int) -> Tensor:
        stride = self.score_stride
        return scores[..., : math.ceil(height / stride), : math.ceil(width / stride)]


def _frame_size(clip: Clip) -> tuple[int, int]:
    sizes = {tuple(frame.shape[-2:]) for frame in clip["frames"]}
    if len(sizes) != 1:
        raise ValueError(f"frames of clip {clip_name(clip)} differ in size: {sorted(sizes)}")
    height, width = sizes.pop()
    return height, width


def _output_size(clip: Clip) -> tuple[int, int]:
    height, width = _frame_size(clip)
    return clip.get("height", height), clip.get("width", width)


def _check_finite(scores: Tensor, name: str, files: Sequence[str]) -> None:
    if not torch.isfinite(scores).all():
        where = f" ({', '.join(files)})" if files else ""
        raise ValueError(
            f"the model's scores for {name}{where} are not finite: the weights hold NaN or Inf, or fp16 overflowed"
            " (try bf16 or no mixed precision)"
        )
