"""Base class of all segmentors: from clips of frames to losses, score maps, label maps, or a stream of scores.

Axes: B clips, T frames, K classes, H W size of the network input, h w size of a score map.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from typing_extensions import Self

from the_mask.data.clips import Clip, as_clips
from the_mask.modeling.fast_layers import speed_up_layers
from the_mask.modeling.freezing import eval_frozen
from the_mask.modeling.scores import label_map, resize_scores
from the_mask.modeling.stream import NO_HINTS, Hints, Stream, StreamState


class Segmentor(nn.Module, Stream):
    """Base class of the meta-architectures: stacking, grouping, resizing and checks around a subclass's computation.

    A subclass implements :meth:`losses`, :meth:`group_scores`, :meth:`init_state`, :meth:`step` and
    :attr:`score_stride`, and :attr:`looks_back` if its scores do not depend on earlier frames.

    Attributes:
        num_classes: K.
        ignore_label: label of pixels without a class.
        size_divisibility: images are padded at the bottom and right to a multiple of this.
        trainable: substrings of the parameter names that stay trainable; () is all. A subclass calls
            :func:`freeze_except` when it is complete.
        frozen_eval: keep modules without a trainable parameter in eval mode while training.
        iteration: the trainer's, see :meth:`set_iteration`.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        ignore_label: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisibility: int = 1,
        trainable: Sequence[str] = (),
        frozen_eval: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.size_divisibility = max(size_divisibility, 1)
        self.trainable = tuple(trainable)
        self.frozen_eval = frozen_eval
        self.iteration = 0
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of this class but the divisibility, to be joined with a subclass's own."""
        return {
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "ignore_label": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "trainable": cfg.MODEL.THE_MASK.TRAINABLE,
            "frozen_eval": cfg.MODEL.THE_MASK.FROZEN_EVAL,
        }

    # Implemented by subclasses.

    @property
    @abstractmethod
    def score_stride(self) -> int:
        """Input pixels per cell of the score maps."""
        raise NotImplementedError

    @abstractmethod
    def losses(self, clips: Sequence[Clip]) -> dict[str, Tensor]:
        """Weighted training losses of a batch of clips, in either mode."""
        raise NotImplementedError

    @abstractmethod
    def group_scores(self, images: Tensor, num_frames: int) -> Iterable[Tensor]:
        """Scores [T, K, >= ceil(H/stride), >= ceil(W/stride)], float32 and >= 0, of each clip in turn.

        Args:
            images: [B*T, 3, H, W] of :meth:`stack`, for clips of one size.
            num_frames: T.
        """
        raise NotImplementedError

    @abstractmethod
    def init_state(self) -> StreamState:
        """State of a stream before its first frame."""
        raise NotImplementedError

    @abstractmethod
    def step(self, frame: Tensor, state: StreamState, hints: Hints = NO_HINTS) -> tuple[Tensor, StreamState]:
        """Segment the newest frame of a stream.

        Args:
            frame: [3, H, W], RGB 0..255. A size other than the last frame's resets the stream, counted in
                ``state["resets"]``.
            state: of :meth:`init_state` or the last step; not changed.
            hints: further information about the frame.

        Returns:
            scores [K, ceil(H/stride), ceil(W/stride)], and the new state.
        """
        raise NotImplementedError

    def runtime_parts(self) -> list[tuple[nn.Module, str]]:
        """Submodules or methods that are plain functions of tensors, as (owner, name) pairs; none by default.

        Together they do the work of a frame; :mod:`the_mask.inference.runtimes` may run them elsewhere.
        """
        return []

    @property
    def has_queries(self) -> bool:
        """Whether the scores are a sum over queries, returned by :meth:`step_queries`."""
        return False

    def step_queries(self, frame: Tensor, state: StreamState) -> tuple[Tensor, Tensor, Tensor, StreamState]:
        """As :meth:`step`, with the queries behind the scores, for a segmentor that :attr:`has_queries`.

        Returns:
            scores; class scores [Q, K] and mask logits [Q, ceil(H/stride), ceil(W/stride)] of the queries, such that
            the sum over q of class scores * sigmoid(mask) is the scores; and the new state.
        """
        raise NotImplementedError

    # Hooks that subclasses may override.

    def set_iteration(self, iteration: int) -> None:
        """Tell the model the trainer's iteration, before its losses."""
        self.iteration = iteration

    def after_step(self) -> None:
        """Called by the trainer once per iteration, after the optimiser's step."""

    # Shared by all.

    def step_many(
        self, frames: Sequence[Tensor], states: Sequence[StreamState], hints: Sequence[Hints] | None = None
    ) -> tuple[list[Tensor], list[StreamState]]:
        """As :meth:`step` for several streams; without a memory, frames of equal size run in one batch."""
        if self.looks_back or any(hint.prior is not None for hint in hints or ()):
            return super().step_many(frames, states, hints)
        states = [self.continue_state(state, frame.shape[-2:]) for frame, state in zip(frames, states, strict=True)]
        scores = self.score_maps([Clip([frame]) for frame in frames])
        return [one[0] for one in scores], [{**state, "seen": state["seen"] + 1} for state in states]

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return self.pixel_mean.device

    def train(self, mode: bool = True) -> Self:
        """Switch the mode; frozen parts stay in eval mode (``MODEL.THE_MASK.FROZEN_EVAL``)."""
        super().train(mode)
        speed_up_layers(self)
        if mode and self.frozen_eval:
            for child in self.children():
                eval_frozen(child)
        return self

    def forward(self, clips: Sequence[Clip | Mapping[str, Any]]) -> dict[str, Tensor] | list[dict[str, list[Tensor]]]:
        """Train: weighted losses by name. Eval: ``{"sem_seg": T tensors [K, height, width]}`` per clip.

        Args:
            clips: of the clip mapper, in training with ``labels`` and ``seed``; or, as Detectron2's models take them,
                dicts with the fields of a :class:`Clip`. Training clips have one T; sizes may differ and are padded at
                the bottom and right.

        Raises:
            ValueError: clips that cannot be stacked, no labels to train on, labels outside the classes, or scores that
                are not finite.
        """
        given = as_clips(clips)
        if self.training:
            unlabelled = [clip.name or str(number) for number, clip in enumerate(given) if not clip.labels]
            if unlabelled:
                raise ValueError(f"clips to train on need `labels`: {', '.join(unlabelled)} have none")
            return self.losses(given)
        return [
            {"sem_seg": [resize_scores(s, clip.frame_size, clip.output_size, self.score_stride) for s in scores]}
            for clip, scores in zip(given, self.score_maps(given), strict=True)
        ]

    @torch.no_grad()
    def score_maps(self, clips: Sequence[Clip]) -> list[Tensor]:
        """Class scores per clip, [T, K, ceil(H/stride), ceil(W/stride)], float32 on the model's device.

        Clips of one length and size are run together, others apart, so a clip's scores do not depend on its batch.

        Raises:
            ValueError: scores that are not finite, naming the clip and its files.
        """
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, clip in enumerate(clips):
            groups[(len(clip), *clip.frame_size)].append(index)
        results: dict[int, Tensor] = {}
        for (frames, height, width), members in groups.items():
            images, _ = self.stack([clips[i] for i in members])
            for index, scores in zip(members, self.group_scores(images, frames), strict=True):
                scores = self.crop_scores(scores, height, width)
                check_finite(scores, clips[index].name, clips[index].file_names)
                results[index] = scores
        return [results[i] for i in range(len(clips))]

    def predict(self, clips: Sequence[Clip]) -> list[list[Tensor]]:
        """Label maps per clip: T uint8 (int32 with more than 255 classes) tensors [height, width] on the CPU."""
        return [
            [label_map(s, clip.frame_size, clip.output_size, self.score_stride) for s in scores]
            for clip, scores in zip(clips, self.score_maps(clips), strict=True)
        ]

    def stack(self, clips: Sequence[Clip]) -> tuple[Tensor, int]:
        """Move to the device, normalise and pad: [B*T, 3, H, W] with H, W multiples of ``size_divisibility``, and T.

        Padding is 0 after normalisation. Raises a ValueError unless clips have one length and frames one size.
        """
        lengths = {len(clip.frames) for clip in clips}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"a batch needs clips of one length >= 1, got lengths {sorted(lengths)}")
        sizes = [clip.frame_size for clip in clips]
        height, width = (
            math.ceil(max(side) / self.size_divisibility) * self.size_divisibility for side in zip(*sizes, strict=True)
        )
        frames = [frame for clip in clips for frame in clip.frames]
        images = self.pixel_mean.new_empty(len(frames), frames[0].shape[0], height, width)
        for image, frame in zip(images, frames):
            h, w = frame.shape[-2:]
            # In place, to write each picture of floats once instead of four times.
            image[:, :h, :w].copy_(frame.to(self.device, non_blocking=True)).sub_(self.pixel_mean).div_(self.pixel_std)
            image[:, h:].zero_()
            image[:, :h, w:].zero_()
        return images, lengths.pop()

    def crop_scores(self, scores: Tensor, height: int, width: int) -> Tensor:
        """Remove cells entirely in the padding: [..., h, w] -> [..., ceil(height/stride), ceil(width/stride)]."""
        stride = self.score_stride
        return scores[..., : math.ceil(height / stride), : math.ceil(width / stride)]


def check_finite(scores: Tensor, name: str, files: Sequence[str]) -> None:
    """Raise a ValueError that names the clip if a score is NaN or Inf. An exported program does not check."""
    if torch.compiler.is_exporting():
        return
    if not torch.isfinite(scores).all():
        where = f" ({', '.join(files)})" if files else ""
        raise ValueError(
            f"the model's scores for {name}{where} are not finite: the weights hold NaN or Inf, or fp16 overflowed"
            " (try bf16 or no mixed precision)"
        )
