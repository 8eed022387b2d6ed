"""Per-pixel models: one meta-architecture for image heads and for heads with a memory of past frames.

It knows nothing about particular attentions: the head says which levels of how many past frames it wants.

Axes: B clips, T memory frames, K classes, H W size of the network input, h w size of a score map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone, build_sem_seg_head
from torch import Tensor, nn

from the_mask.config.keys.context import ClipSegmentorOptions
from the_mask.data.clips import Clip
from the_mask.modeling.freezing import freeze_except
from the_mask.modeling.pixel.context.prior_providers import PriorProvider, build_prior_provider
from the_mask.modeling.pixel.context.types import (
    ClipFeatures,
    FrameFeatures,
    HeadOutput,
    PriorMap,
    TrainBatch,
    fill_missing,
)
from the_mask.modeling.pixel.heads.base import PixelHead
from the_mask.modeling.pixel.heads.fcn import build_aux_heads
from the_mask.modeling.pixel.pixel_loss import HardPixels, pixel_loss
from the_mask.modeling.segmentor import Segmentor, check_finite
from the_mask.modeling.stream import NO_HINTS, Hints, Ring, StreamState

DEFAULT_AUX_WEIGHT = 0.4


@META_ARCH_REGISTRY.register()
class ClipSegmentor(Segmentor):
    """Backbone and a per-pixel head, with auxiliary heads while training; keys ``backbone``, ``sem_seg_head``,
    ``auxiliary_heads.<level>``.

    Only the last frame of a training clip (the mapper's reference) is supervised; the frames before it are memory.
    In eval mode every frame is predicted from the frames before it, through the same code as a stream.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: PixelHead,
        auxiliary_heads: nn.ModuleDict | None = None,
        prior_provider: PriorProvider | None = None,
        hard_pixels: HardPixels | None = None,
        options: ClipSegmentorOptions = ClipSegmentorOptions(),
        memory_stride: int = 1,
        **shared: Any,
    ) -> None:
        """
        Args:
            memory_stride: of streams: frames between two memory frames, as far apart as those of the training clips.
            shared: the arguments of :class:`Segmentor`.
        """
        least = math.lcm(max(options.size_divisibility, 1), max(backbone.size_divisibility, 1))
        super().__init__(size_divisibility=least, **shared)
        if memory_stride < 1:
            raise ValueError(f"TEST.CLIP_STRIDE {memory_stride}: expected at least 1")
        if not isinstance(sem_seg_head, PixelHead):
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.NAME {type(sem_seg_head).__name__}: ClipSegmentor needs a per-pixel head "
                "(FCNHead, UperNetHead, ContextHead, ...)"
            )
        if sem_seg_head.uses_prior and type(prior_provider or PriorProvider()) is PriorProvider:
            raise ValueError(
                "the head reads a class prior (block class_memory), but MODEL.CONTEXT.PRIOR is none: set it to "
                "previous_prediction, stage1 or stored_masks"
            )
        self.backbone: Backbone = backbone
        self.sem_seg_head: PixelHead = sem_seg_head
        self.auxiliary_heads = auxiliary_heads if auxiliary_heads is not None else nn.ModuleDict()
        self.prior_provider = prior_provider or PriorProvider()
        self.hard_pixels = hard_pixels
        self.options = options
        class_weights = options.class_weights
        if class_weights and (len(class_weights) != self.num_classes or min(class_weights) < 0):
            raise ValueError(
                f"MODEL.CLIP_SEGMENTOR.CLASS_WEIGHTS {list(class_weights)}: expected {self.num_classes} numbers >= 0, "
                "one per class, or none"
            )
        weights = torch.tensor(class_weights, dtype=torch.float32) if class_weights else None
        self.register_buffer("class_weights", weights, persistent=False)
        self.class_weights: Tensor | None
        self.ring = Ring(sem_seg_head.memory_length, memory_stride, newest=memory_stride)
        freeze_except(self, self.trainable)
        self.train()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone = build_backbone(cfg)
        ohem = cfg.MODEL.CLIP_SEGMENTOR.OHEM
        return {
            **super().from_config(cfg),
            "backbone": backbone,
            "sem_seg_head": build_sem_seg_head(cfg, backbone.output_shape()),
            "auxiliary_heads": build_aux_heads(cfg, backbone.output_shape()),
            "prior_provider": build_prior_provider(cfg),
            "hard_pixels": HardPixels(ohem.THRESHOLD, ohem.MIN_KEPT) if ohem.ENABLED else None,
            "options": ClipSegmentorOptions.from_config(cfg),
            "memory_stride": cfg.TEST.CLIP_STRIDE,
        }

    @property
    def score_stride(self) -> int:
        """Input pixels per cell of the score maps."""
        return self.sem_seg_head.stride

    @property
    def looks_back(self) -> bool:
        """True if the head has a memory or reads a prior."""
        return self.memory_length > 0 or self.sem_seg_head.uses_prior

    @property
    def reads_prior(self) -> bool:
        """Whether a block of the head reads a prior."""
        return self.sem_seg_head.uses_prior

    @property
    def memory_length(self) -> int:
        """Number of memory frames of the head, T."""
        return self.sem_seg_head.memory_length

    # Training.

    def losses(self, clips: Sequence[Clip]) -> dict[str, Tensor]:
        """Weighted cross-entropies of the current frames: ``loss_ce``, and ``loss_ce_<name>`` of auxiliary logits."""
        batch = self.training_batch(clips)
        prior = self.prior_provider.for_training(self, batch) if self.sem_seg_head.uses_prior else None
        features, output = self.clip_output(batch, prior)
        return self.output_losses(batch, features, output)

    def output_losses(self, batch: TrainBatch, features: FrameFeatures, output: HeadOutput) -> dict[str, Tensor]:
        """Losses of the result of :meth:`clip_output`; in training, stateful blocks also receive the labels."""
        rule = (batch.labels, self.ignore_label)
        losses = {"loss_ce": pixel_loss(output.logits, *rule, self.hard_pixels, self.class_weights)}
        for name, logits in output.aux.items():
            weight = output.aux_weights.get(name, DEFAULT_AUX_WEIGHT)
            losses[f"loss_ce_{name}"] = weight * pixel_loss(logits, *rule, None, self.class_weights)
        for level, head in self.auxiliary_heads.items():
            logits = head(features).logits
            losses[f"loss_ce_aux_{level}"] = self.options.aux_weight * pixel_loss(
                logits, *rule, None, self.class_weights
            )
        if self.training:
            losses.update(self.sem_seg_head.extra_losses(self.iteration))
            with torch.no_grad():
                for block in self.sem_seg_head.stateful_blocks():
                    block.after_loss(batch, self.iteration)  # type: ignore[operator]
        return losses

    def after_step(self) -> None:
        """Update stateful blocks with what they collected in this iteration."""
        with torch.no_grad():
            for block in self.sem_seg_head.stateful_blocks():
                block.after_step()  # type: ignore[operator]

    def training_batch(self, clips: Sequence[Clip]) -> TrainBatch:
        """Current frames, the frames before them that head and prior need, and labels.

        A clip with fewer frames is extended into the past by repeating its oldest one, in slots marked as invalid. A
        slot that repeats the frame of a later one (a boundary policy of the loader) is invalid, too.

        Raises:
            ValueError: labels outside the classes; a clip without its whole past under PAD "drop".
        """
        past = self.memory_length + self.prior_provider.past_frames
        cut = [_cut_clip(clip, past) for clip in clips]
        valid = torch.tensor([_valid_slots(clip, past) for clip in cut]).reshape(len(clips), past)
        if self.options.pad == "drop" and not bool(valid.all()):
            bad = next(clip for clip, row in zip(clips, valid) if not bool(row.all()))
            raise ValueError(
                f"clip {bad.name} has no {past} frames before its reference, and MODEL.CLIP_SEGMENTOR.PAD is "
                "drop: set INPUT.CLIP.BOUNDARY to drop as well, or PAD to repeat_first"
            )
        whole = [clip.lengthened(past + 1) for clip in cut]
        images, frames = self.stack(whole)
        images = images.unflatten(0, (len(clips), frames))
        labels = stack_labels(whole, -1, self.num_classes, self.ignore_label, (images.shape[-2], images.shape[-1]))
        return TrainBatch(whole, images, labels.to(self.device), valid.to(self.device))

    def clip_output(self, batch: TrainBatch, prior: PriorMap | None = None) -> tuple[FrameFeatures, HeadOutput]:
        """Backbone features of the current frames, and the head's output for them, their memory and their prior."""
        length = self.memory_length
        current, past = self._clip_features(batch.images[:, batch.images.shape[1] - 1 - length :])
        memory = None
        if length:
            memory = ClipFeatures(tuple(past), batch.valid[:, batch.valid.shape[1] - length :])
            levels = self.sem_seg_head.memory_levels
            memory = fill_missing(memory, self.options.pad, {level: current[level] for level in levels})
        return current, self.sem_seg_head(current, memory, prior)

    def _clip_features(self, images: Tensor) -> tuple[FrameFeatures, Sequence[FrameFeatures]]:
        """Backbone features of the last of some frames [B, T+1, 3, H, W], and memory levels of the frames before."""
        frames, levels = images.shape[1], self.sem_seg_head.memory_levels
        past: list[FrameFeatures] = []
        if self.options.fold_time and self.options.memory_grad:
            folded = self.backbone(images.flatten(0, 1))
            split = {name: x.unflatten(0, (-1, frames)) for name, x in folded.items()}
            past += [{level: split[level][:, t] for level in levels} for t in range(frames - 1)]
            return {name: x[:, -1] for name, x in split.items()}, past
        with nullcontext() if self.options.memory_grad else torch.no_grad():
            if self.options.fold_time and frames > 1:
                folded = self.backbone(images[:, :-1].flatten(0, 1))
                split = {level: folded[level].unflatten(0, (-1, frames - 1)) for level in levels}
                past += [{level: split[level][:, t] for level in levels} for t in range(frames - 1)]
            else:
                for t in range(frames - 1):
                    features = self.backbone(images[:, t])
                    past.append({level: features[level] for level in levels})
        return self.backbone(images[:, -1]), past

    # Prediction.

    def group_scores(self, images: Tensor, num_frames: int) -> Iterator[Tensor]:
        """Probabilities of a group of equal clips, each frame from those before it; see :class:`Segmentor`."""
        images = images.unflatten(0, (-1, num_frames))
        memory = _empty_memory()
        scores = []
        for t in range(num_frames):
            frame, memory = self._advance(images[:, t], memory)
            scores.append(frame)
        yield from torch.stack(scores, dim=1)

    def init_state(self) -> StreamState:
        """State before the first frame.

        Its ``memory`` has the ring's ``frames``, ``{level: [1, C, h, w]}`` each, and the prior provider's ``prior``.
        """
        return self.new_state(memory=_empty_memory())

    @torch.no_grad()
    def step(self, frame: Tensor, state: StreamState, hints: Hints = NO_HINTS) -> tuple[Tensor, StreamState]:
        """Segment the newest frame of a stream: one backbone pass, the rest comes from the state.

        Args:
            frame: [3, H, W], RGB 0..255. A size other than the last frame's resets the stream, counted in
                ``state["resets"]``.
            state: of :meth:`init_state` or the last step; not changed.
            hints: a prior, one map of the frame's size, replaces that of the prior provider.

        Returns:
            probabilities [K, ceil(H/stride), ceil(W/stride)], and the new state.

        Raises:
            ValueError: a state of another stream, a prior that does not fit or that the head does not read, or scores
                that are not finite.
        """
        height, width = frame.shape[-2:]
        state = self.continue_state(state, (height, width))
        images, _ = self.stack([Clip([frame])])
        prior = hints.prior
        if prior is not None:
            self.check_hints(hints)
            prior = prior.require(1, (height, width), self.num_classes).pad(images.shape[-2], images.shape[-1])
            prior = prior.to(self.device)
        scores, memory = self._advance(images, state["memory"], prior)
        scores = self.crop_scores(scores[0], height, width)
        check_finite(scores, f"frame {state['seen']} of a stream", ())
        return scores, {**state, "seen": state["seen"] + 1, "memory": memory}

    def runtime_parts(self) -> list[tuple[nn.Module, str]]:
        """One part for images; backbone and head apart where frames are remembered between them."""
        if self.memory_length or self.sem_seg_head.uses_prior:
            return [(self, "backbone"), (self, "sem_seg_head")]
        return [(self, "image_logits")]

    def image_logits(self, images: Tensor) -> Tensor:
        """Logits [B, K, h, w], float32, of normalised images [B, 3, H, W], by a head that does not look back."""
        return self.sem_seg_head(self.backbone(images)).logits.float()

    def _advance(
        self, images: Tensor, memory: dict[str, Any], prior: PriorMap | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Probabilities [B, K, h, w] of the next frames [B, 3, H, W] of B streams, and their new memories."""
        if not self.memory_length and not self.sem_seg_head.uses_prior:
            return self.image_logits(images).softmax(dim=1), memory
        features = self.backbone(images)
        if prior is None and self.sem_seg_head.uses_prior:
            prior = self.prior_provider.for_frame(memory["prior"])
        # Backbone levels only: features that depend on a frame's slot are recomputed as the frame ages.
        current = {level: features[level] for level in self.sem_seg_head.memory_levels}
        output = self.sem_seg_head(features, self._memory(memory["frames"], current), prior)
        scores = output.logits.float().softmax(dim=1)
        return scores, {
            "frames": self.ring.push(memory["frames"], {level: x.detach() for level, x in current.items()}),
            "prior": self.prior_provider.after_frame(memory["prior"], scores),
        }

    def _memory(self, kept: Sequence[FrameFeatures], current: FrameFeatures) -> ClipFeatures | None:
        """The T frames before the current one; None for T = 0. Frames missing at the start are filled by PAD."""
        if not self.memory_length:
            return None
        found = self.ring.read(kept)
        missing = self.memory_length - len(found)
        # As long as a slot is missing, the oldest entry is the stream's first frame.
        repeats_first = bool(kept) and self.options.pad in ("repeat_first", "drop")
        fill = kept[0] if kept and self.options.pad != "repeat_current" else current
        valid = torch.tensor(
            [slot >= missing or repeats_first for slot in range(self.memory_length)],
            device=next(iter(current.values())).device,
        )
        batch = next(iter(current.values())).shape[0]
        memory = ClipFeatures((*[fill] * missing, *found), valid.expand(batch, -1))
        return fill_missing(memory, self.options.pad, current)


def stack_labels(
    clips: Sequence[Clip], position: int, num_classes: int, ignore_label: int, size: tuple[int, int]
) -> Tensor:
    """Label maps of one frame of every clip, int64 [B, H, W] of ``size``, padded at the bottom and right.

    Args:
        clips: their ``labels``; None is a map of ``ignore_label``.
        position: of the frame in the clips.
        num_classes: K.
        ignore_label: label of pixels without a class.
        size: (H, W) of the network input.

    Raises:
        ValueError: a label that is neither a class nor ``ignore_label``, or a map larger than ``size``.
    """
    stacked = torch.full((len(clips), *size), ignore_label, dtype=torch.int64)
    for row, clip in enumerate(clips):
        labels = clip.labels[position]
        if labels is None:
            continue
        height, width = labels.shape
        if height > size[0] or width > size[1]:
            raise ValueError(f"clip {clip.name}: labels of {(height, width)} do not fit the network input {size}")
        odd = labels[(labels != ignore_label) & ((labels < 0) | (labels >= num_classes))]
        if odd.numel():
            raise ValueError(
                f"clip {clip.name}: labels {sorted(set(odd.tolist()))[:10]} are outside 0..{num_classes - 1} and "
                f"are not {ignore_label} (ignore); check the data set with `the-mask check`"
            )
        stacked[row, :height, :width] = labels
    return stacked


def _empty_memory() -> dict[str, Any]:
    return {"frames": [], "prior": {}}


def _cut_clip(clip: Clip, past: int) -> Clip:
    """The reference frame of a clip and at most ``past`` frames before it."""
    last = len(clip) - 1 if clip.reference is None else clip.reference
    return clip.window(max(0, last - past), last + 1)


def _valid_slots(clip: Clip, past: int) -> list[bool]:
    """Whether each of the ``past`` slots before the current frame shows a distinct frame."""
    indices = clip.frame_indices or range(len(clip))
    own = [indices[i] not in indices[i + 1 :] for i in range(len(clip) - 1)]
    return [False] * (past - len(own)) + own


__all__ = ["ClipSegmentor", "stack_labels"]
