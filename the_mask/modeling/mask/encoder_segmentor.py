"""Encoder-only mask classification: a plain vision transformer whose last blocks also see the queries.

One frame at a time it is EoMT (CVPR 2025); with queries carried from frame to frame it is VidEoMT (CVPR 2026). With a
decoder of its own on a frozen encoder it is PMT (arXiv:2603.25398).

Axes: B clips, T frames, N = B*T images, Q queries, K classes, D width, P prefix tokens, S = Q + P + patches,
H W size of the network input, h w mask size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import Tensor, nn

from the_mask.config.keys.encoder import EncoderOptions, FrozenDecoderOptions
from the_mask.config.keys.mask_former import MaskOptions
from the_mask.data.clips import Clip
from the_mask.modeling.freezing import freeze_except
from the_mask.modeling.mask.criterion import MaskCriterion
from the_mask.modeling.mask.encoder_head import (
    MASK_STRIDE,
    EncoderHead,
    annealed_probability,
    attention_mask,
    check_annealing,
)
from the_mask.modeling.mask.frozen_decoder import GRID_STRIDE, build_frozen_decoder
from the_mask.modeling.mask.mask_decoders.base import Predictions
from the_mask.modeling.mask.targets import build_targets
from the_mask.modeling.scores import semantic_scores
from the_mask.modeling.segmentor import Segmentor, check_finite
from the_mask.modeling.stream import NO_HINTS, Hints, StreamState

if TYPE_CHECKING:
    # It imports timm, which takes more than a second.
    from the_mask.modeling.backbones.plain_vit import Tokens

Pair = tuple[Tensor, Tensor]


@META_ARCH_REGISTRY.register()
class EncoderSegmentor(Segmentor):
    """Encoder, queries and heads; losses in training, score maps and label maps in eval mode.

    State-dict keys: ``backbone.model`` (timm's names), ``sem_seg_head`` (EoMT's names), ``criterion.empty_weight``.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: EncoderHead,
        criterion: MaskCriterion,
        num_blocks: int,
        options: EncoderOptions = EncoderOptions(),
        mask_options: MaskOptions = MaskOptions(),
        max_iter: int = 1,
        **shared: Any,
    ) -> None:
        """
        Args:
            num_blocks: blocks that see the queries, of the encoder or of the head's own decoder.
            max_iter: of the training, for the annealing.
            shared: the arguments of :class:`Segmentor`.

        Raises:
            ValueError: values outside their range.
        """
        strides = [shape.stride or 1 for shape in backbone.output_shape().values()]
        super().__init__(size_divisibility=max(strides), **shared)
        depth = getattr(backbone, "depth", 0)
        if sem_seg_head.decoder is None and not 1 <= num_blocks <= depth:
            raise ValueError(f"MODEL.ENCODER.NUM_BLOCKS is {num_blocks}; the encoder has {depth} blocks")
        # The published steps of both data sets are evenly spread: block i from (i + 1) / (n + 2) to (i + 2) / (n + 2).
        shares = [(i + 1) / (num_blocks + 2) for i in range(num_blocks + 1)]
        self.anneal_start = list(options.anneal_start) or shares[:-1]
        self.anneal_end = list(options.anneal_end) or shares[1:]
        check_annealing(self.anneal_start, self.anneal_end, num_blocks)
        self.backbone: Any = backbone
        self.sem_seg_head: EncoderHead = sem_seg_head
        self.criterion = criterion
        self.num_blocks = num_blocks
        self.patch_size: int = getattr(backbone, "patch_size", GRID_STRIDE)
        self.options = options
        self.max_iter = max(max_iter, 1)
        self.deep_supervision = mask_options.deep_supervision
        self.enlarge = MASK_STRIDE if mask_options.merge_at == "input" else 1
        self._probabilities = [1.0] * num_blocks
        if sem_seg_head.decoder is None:
            vit: Any = backbone
            vit.make_room(sem_seg_head.num_queries, depth - num_blocks)
            self.num_prefix_tokens: int = vit.num_prefix_tokens
        else:
            backbone.requires_grad_(False)
            self.num_prefix_tokens = sem_seg_head.decoder.num_prefix_tokens
        freeze_except(self, self.trainable)
        self.train()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        options, frozen = EncoderOptions.from_config(cfg), FrozenDecoderOptions.from_config(cfg)
        backbone: Any = build_backbone(cfg)
        queries = cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES
        if not frozen.enabled and not hasattr(backbone, "make_room"):
            raise ValueError(
                f"EncoderSegmentor needs MODEL.BACKBONE.NAME build_vit_backbone, not {cfg.MODEL.BACKBONE.NAME}, or "
                "MODEL.ENCODER.FROZEN.ENABLED True"
            )
        decoder = build_frozen_decoder(frozen, backbone, queries) if frozen.enabled else None
        num_blocks = frozen.blocks if frozen.enabled else options.num_blocks
        head = EncoderHead(
            backbone.width if decoder is None else decoder.width,
            queries,
            cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            getattr(backbone, "patch_size", GRID_STRIDE),
            num_blocks,
            options.propagate,
            decoder,
        )
        return {
            **super().from_config(cfg),
            "backbone": backbone,
            "sem_seg_head": head,
            "criterion": MaskCriterion(cfg),
            "num_blocks": num_blocks,
            "options": options,
            "mask_options": MaskOptions.from_config(cfg),
            "max_iter": cfg.SOLVER.MAX_ITER,
        }

    @property
    def score_stride(self) -> int:
        """Input pixels per cell of the score maps."""
        return MASK_STRIDE // self.enlarge

    @property
    def propagates(self) -> bool:
        """Whether queries are carried from frame to frame."""
        return self.sem_seg_head.query_updater is not None

    @property
    def looks_back(self) -> bool:
        """Whether the result on a stream depends on earlier frames."""
        return self.propagates

    def set_iteration(self, iteration: int) -> None:
        """Take the trainer's iteration, which sets how often the attention masks are used."""
        super().set_iteration(iteration)
        share = iteration / self.max_iter
        self._probabilities = [
            annealed_probability(share, start, end)
            for start, end in zip(self.anneal_start, self.anneal_end, strict=True)
        ]
        self.sem_seg_head.attn_mask_probs.copy_(torch.tensor(self._probabilities))

    def stack(self, clips: Sequence[Clip]) -> tuple[Tensor, int]:
        for clip in clips:
            for frame in clip.frames:
                if min(frame.shape[-2:]) < self.patch_size:
                    raise ValueError(
                        f"clip {clip.name!r}: a frame of {frame.shape[-2]}x{frame.shape[-1]} pixels is smaller "
                        f"than one patch of the encoder, {self.patch_size}"
                    )
        return super().stack(clips)

    def losses(self, clips: Sequence[Clip]) -> dict[str, Tensor]:
        """Weighted training losses of a batch of clips, in either mode."""
        images, frames = self.stack(clips)
        outputs = self.predictions(images, frames, aux=self.deep_supervision)
        size = (images.shape[-2], images.shape[-1])
        targets = build_targets(clips, self.ignore_label, self.num_classes, size, self.device)
        return self.criterion(outputs, targets, [clip.seed for clip in clips], self.iteration)

    def predictions(self, images: Tensor, num_frames: int, aux: bool = False) -> Predictions:
        """Predictions of all prediction sets of a batch of clips.

        Args:
            images: [B*T, 3, H, W] of :meth:`stack`.
            num_frames: T.
            aux: also predict before each of the last blocks.

        Returns:
            ``pred_logits`` [B, T, Q, K + 1], ``pred_masks`` [B, Q, T, h, w] and ``aux_outputs``, a list of such dicts.

        Raises:
            ValueError: clips of several frames for a model that trains on single ones.
        """
        if num_frames > 1 and not self.propagates:
            raise ValueError(
                f"clips of {num_frames} frames, but this model does not carry its queries on: set "
                "MODEL.ENCODER.PROPAGATE True, or INPUT.CLIP.DILATIONS [0]"
            )
        tokens = self._encode(images)
        values = tokens.values.unflatten(0, (-1, num_frames))
        queries = self.sem_seg_head.first_queries(len(values))
        by_frame: list[list[Pair]] = []
        for t in range(num_frames):
            sets, queries = self._segment(tokens._replace(values=values[:, t]), queries, aux)
            by_frame.append(sets)
        nested = [
            {
                "pred_logits": torch.stack([logits for logits, _ in frames], dim=1),
                # Views of [B, T, Q, h, w], the layout in which the criterion looks up matched masks.
                "pred_masks": torch.stack([masks for _, masks in frames], dim=1).transpose(1, 2),
            }
            for frames in zip(*by_frame, strict=True)
        ]
        return {**nested[-1], "aux_outputs": nested[:-1]}

    def group_scores(self, images: Tensor, num_frames: int) -> Iterator[Tensor]:
        """Scores of a group of equal clips, one clip at a time; see :class:`Segmentor`.

        Frames run one after the other, just as in a stream, so that a clip's scores are those of its stream.
        """
        by_frame = images.unflatten(0, (-1, num_frames))
        if self.propagates and self.options.class_logits == "whole-video":
            results = self._whole_video_scores(by_frame)
        else:
            results = self._causal_scores(by_frame)
        yield from results.unbind(0)

    def _causal_scores(self, images: Tensor) -> Tensor:
        """[B, T, 3, H, W] -> scores [B, T, K, h, w], each frame from the frames up to it."""
        state = self._fresh(len(images))
        scores = []
        for t in range(images.shape[1]):
            logits, masks, state = self._next(images[:, t], state)
            scores.append(torch.stack([self._merge(*pair) for pair in zip(logits, masks, strict=True)]))
        return torch.stack(scores, dim=1)

    def _whole_video_scores(self, images: Tensor) -> Tensor:
        """As :meth:`_causal_scores`, but with class logits averaged over all frames, including later ones."""
        count, frames, _, height, width = images.shape
        cells = -(-height // MASK_STRIDE) * -(-width // MASK_STRIDE)
        _check_memory(4 * count * frames * cells * (self.sem_seg_head.num_queries + self.num_classes), images, frames)
        state = self._fresh(count)
        masks = []
        for t in range(frames):
            _, own, state = self._next(images[:, t], state)
            masks.append(own)
        mean = state["class_sum"] / state["count"]
        return torch.stack([torch.stack([self._merge(mean[b], own[b]) for own in masks]) for b in range(count)])

    def _merge(self, logits: Tensor, masks: Tensor) -> Tensor:
        return semantic_scores(logits, masks, enlarge=self.enlarge)

    # Streams.

    def init_state(self) -> StreamState:
        """State of a stream before its first frame.

        Besides what all states have: ``queries`` [Q, D] of the next frame, ``class_sum``
        [Q, K + 1] of the class logits so far, and ``count`` of the frames in it; none of them without propagation.
        """
        return self.new_state(**{name: value[0] for name, value in self._fresh(1).items()})

    @property
    def has_queries(self) -> bool:
        """Whether scores are sums over queries: MERGE_AT mask."""
        return self.enlarge == 1

    @torch.no_grad()
    def step(self, frame: Tensor, state: StreamState, hints: Hints = NO_HINTS) -> tuple[Tensor, StreamState]:
        """Segment the newest frame of a stream; see :class:`Segmentor`.

        The result is that of :meth:`score_maps` for this frame of a clip that began where the stream did.

        Raises:
            ValueError: class logits of whole videos are required, or scores are not finite.
        """
        self.check_hints(hints)
        ((scores, _, _, state),) = self._advance([frame], [state])
        return scores, state

    @torch.no_grad()
    def step_queries(self, frame: Tensor, state: StreamState) -> tuple[Tensor, Tensor, Tensor, StreamState]:
        """As :meth:`step`, with the queries behind the scores; see :class:`Segmentor`.

        Raises:
            ValueError: ``MODEL.MASK_FORMER.MERGE_AT`` is input, so scores are not a sum over queries.
        """
        if self.enlarge > 1:
            raise ValueError("masks of queries cannot be carried with MODEL.MASK_FORMER.MERGE_AT input: set it to mask")
        ((scores, classes, masks, new),) = self._advance([frame], [state])
        return scores, classes, masks, new

    @torch.no_grad()
    def step_many(
        self, frames: Sequence[Tensor], states: Sequence[StreamState], hints: Sequence[Hints] | None = None
    ) -> tuple[list[Tensor], list[StreamState]]:
        """Advance several streams by one frame each, in one batch per size; results as of :meth:`step`."""
        for hint in hints or ():
            self.check_hints(hint)
        done = self._advance(frames, states)
        return [scores for scores, *_ in done], [state for *_, state in done]

    def _advance(
        self, frames: Sequence[Tensor], states: Sequence[StreamState]
    ) -> list[tuple[Tensor, Tensor, Tensor, StreamState]]:
        if self.propagates and self.options.class_logits == "whole-video":
            raise ValueError(
                "TEST.CLASS_LOGITS whole-video needs the whole video at once: set TEST.STREAMING False and "
                "TEST.CLIP_LENGTH to at least the longest video, or TEST.CLASS_LOGITS causal-mean for streams"
            )
        found = [self.continue_state(state, frame.shape[-2:]) for state, frame in zip(states, frames, strict=True)]
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, frame in enumerate(frames):
            groups.setdefault(tuple(frame.shape[-2:]), []).append(index)
        done: dict[int, tuple[Tensor, Tensor, Tensor, StreamState]] = {}
        for members in groups.values():
            images, _ = self.stack([Clip([frames[i]]) for i in members])
            names = [name for name in ("queries", "class_sum", "count") if self.propagates]
            batch = {name: torch.stack([found[i][name].to(self.device) for i in members]) for name in names}
            logits, masks, batch = self._next(images, batch)
            for row, index in enumerate(members):
                height, width = frames[index].shape[-2:]
                scores = self.crop_scores(self._merge(logits[row], masks[row]), height, width)
                check_finite(scores, f"frame {found[index]['seen']} of a stream", ())
                state = {**found[index], "seen": found[index]["seen"] + 1, **{n: batch[n][row] for n in names}}
                classes = logits[row].float().softmax(dim=-1)[:, :-1]
                done[index] = (scores, classes, self.crop_scores(masks[row].float(), height, width), state)
        return [done[index] for index in range(len(frames))]

    def _fresh(self, count: int) -> dict[str, Tensor]:
        """The carried state of ``count`` streams before their first frame, stacked."""
        if not self.propagates:
            return {}
        head = self.sem_seg_head
        return {
            "queries": head.first_queries(count).detach(),
            "class_sum": head.q.weight.new_zeros(count, head.num_queries, self.num_classes + 1, dtype=torch.float32),
            "count": head.q.weight.new_zeros(count, 1, 1, dtype=torch.float32),
        }

    def _next(self, images: Tensor, carried: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One frame of some streams: class logits to use [B, Q, K + 1], masks [B, Q, h, w], and the state to carry."""
        queries = carried["queries"] if carried else self.sem_seg_head.first_queries(len(images))
        logits, masks, queries = self.segment_images(images, queries)
        if not carried:
            return logits, masks, carried
        total, count = carried["class_sum"] + logits.float(), carried["count"] + 1
        own = logits if self.options.class_logits == "per-frame" else total / count
        return own, masks, {"queries": queries, "class_sum": total, "count": count}

    # The network.

    def runtime_parts(self) -> list[tuple[nn.Module, str]]:
        """The whole network, whose only memory are the queries that go in and come out."""
        return [(self, "segment_images")]

    def segment_images(self, images: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One frame of some streams.

        Args:
            images: [B, 3, H, W] of :meth:`stack`.
            queries: [B, Q, D].

        Returns:
            class logits [B, Q, K + 1], mask logits [B, Q, h, w], and the queries of the next frame [B, Q, D].
        """
        ((logits, masks),), queries = self._segment(self._encode(images), queries, aux=False)
        return logits, masks, queries

    def _encode(self, images: Tensor) -> Tokens:
        """The input of the blocks with queries: tokens [N, P + patches, D]."""
        decoder = self.sem_seg_head.decoder
        if decoder is not None:
            with torch.no_grad():
                features = self.backbone(images)
            return decoder.join(features, (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size))
        tokens = self.backbone.embed(images)
        first = self.backbone.depth - self.num_blocks
        return tokens._replace(values=self.backbone.blocks(tokens.values, tokens.rotation, 0, first))

    def _segment(self, tokens: Tokens, queries: Tensor, aux: bool) -> tuple[list[Pair], Tensor]:
        """Run the blocks with queries, for one frame of each clip.

        Args:
            tokens: values [B, P + patches, D].
            queries: [B, Q, D].
            aux: also predict before each block.

        Returns:
            Prediction sets (logits [B, Q, K + 1], masks [B, Q, h, w]), the final one last; the next frame's queries.
        """
        count, prefix, norm = self.sem_seg_head.num_queries, self.num_prefix_tokens, self._norm
        x = torch.cat([queries.to(tokens.values.dtype), tokens.values], dim=1)
        sets: list[Pair] = []
        for number, probability in enumerate(self._probabilities):
            masked = self.training and self.options.masked_attention and probability > 0
            allowed = None
            if aux or masked:
                with torch.set_grad_enabled(torch.is_grad_enabled() and aux):
                    pair = self._predict(norm(x) if self.options.norm_auxiliary else x, tokens.grid)
                if aux:
                    sets.append(pair)
                if masked:
                    keep = None
                    if probability < 1:
                        keep = torch.rand(len(x), count, device=x.device) < probability
                    allowed = attention_mask(pair[1], tokens.grid, prefix, keep)
            x = self._block(number, x, tokens.rotation, allowed)
        normed = norm(x)
        sets.append(self._predict(normed, tokens.grid))
        if not self.propagates:
            return sets, queries
        return sets, self.sem_seg_head.carry((normed if self.options.norm_queries else x)[:, :count])

    def _norm(self, x: Tensor) -> Tensor:
        decoder = self.sem_seg_head.decoder
        return self.backbone.norm(x) if decoder is None else decoder.norm(x)

    def _block(self, number: int, x: Tensor, rotation: Tensor | None, allowed: Tensor | None) -> Tensor:
        decoder = self.sem_seg_head.decoder
        if decoder is None:
            return self.backbone.block(self.backbone.depth - self.num_blocks + number, x, rotation, allowed)
        return decoder.blocks[number](x, rope=rotation, attn_mask=allowed)

    def _predict(self, x: Tensor, grid: tuple[int, int]) -> Pair:
        count, prefix = self.sem_seg_head.num_queries, self.num_prefix_tokens
        return self.sem_seg_head.predict(x[:, :count], x[:, count + prefix :], grid)


def _check_memory(needed: int, images: Tensor, frames: int) -> None:
    """Raise a ValueError if the masks of a clip will not fit into the free memory."""
    if images.device.type == "cuda":
        free = torch.cuda.mem_get_info(images.device)[0]
    elif images.device.type == "cpu" and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if needed > free:
        raise ValueError(
            f"a clip of {frames} frames of {images.shape[-2]}x{images.shape[-1]} pixels needs {needed / 2**30:.1f} GiB "
            f"for its masks, and {free / 2**30:.1f} GiB are free: TEST.CLASS_LOGITS whole-video keeps them all; use "
            "causal-mean, or a smaller TEST.CLIP_LENGTH"
        )
