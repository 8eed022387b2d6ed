"""A heavy segmentor on keyframes, a light propagator in between, and a policy that chooses the keyframes.

Axes: B streams, T frames, K classes, Q queries, H W pixels of the frames, h w cells of the working grid.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn
from typing_extensions import Self

from the_mask.config.keys.keyframe import KeyframeOptions
from the_mask.data.clips import Clip
from the_mask.modeling.pixel.clip_segmentor import ClipSegmentor, stack_labels
from the_mask.modeling.propagation import geometry, stream_state, training
from the_mask.modeling.propagation.build import build_key_segmentor, build_propagator
from the_mask.modeling.propagation.carried import CarriedGrid
from the_mask.modeling.propagation.policies import Gate, Measure, build_policy, decide
from the_mask.modeling.propagation.propagators import Propagated, Propagator
from the_mask.modeling.propagation.score_cache import ScoreCache, cache_from_config
from the_mask.modeling.segmentor import Segmentor, check_finite
from the_mask.modeling.stream import NO_HINTS, Hints, StreamState


@dataclass
class _Turn:
    """The next frame of one stream while :meth:`PropagatedSegmentor.step_many` processes it.

    Attributes:
        frame: [3, H, W]; ``small``: [3, h, w].
        state: of the stream before the frame.
        reason: why it must be a keyframe; "" if it need not be one.
        carried: the state if it is propagated; ``detail``: the propagator's output.
    """

    frame: Tensor
    small: Tensor
    state: StreamState
    reason: str
    carried: StreamState | None = None
    detail: Propagated | None = None


@META_ARCH_REGISTRY.register()
class PropagatedSegmentor(Segmentor):
    """Runs any segmentor on keyframes only, and propagates its scores to the frames between.

    Scores are propagated as log-probabilities on a grid of ``stride`` pixels; the model's outputs are
    probabilities. State-dict keys: ``segmentor`` (frozen, always in eval mode) and ``propagator``. A segmentor that
    looks back sees the keyframes before the present one.

    Streams of equal frame size may be advanced together by :meth:`step_many`; :meth:`key_step` and :meth:`propagate`
    are its halves, for engines that choose keyframes themselves.
    """

    frame_mean: Tensor
    frame_std: Tensor
    class_weights: Tensor | None

    @configurable
    def __init__(
        self,
        *,
        segmentor: Segmentor,
        propagator: Propagator,
        policy: tuple[str, Measure, Gate],
        frame_mean: Sequence[float],
        frame_std: Sequence[float],
        options: KeyframeOptions = KeyframeOptions(),
        cache: ScoreCache | None = None,
    ) -> None:
        """``policy`` is of :func:`build_policy`.

        Raises:
            ValueError: parts that do not fit each other.
        """
        super().__init__(
            num_classes=segmentor.num_classes,
            ignore_label=segmentor.ignore_label,
            # Frames are not normalised here: the segmentor does that itself, and the propagator gets small frames.
            pixel_mean=(0.0, 0.0, 0.0),
            pixel_std=(1.0, 1.0, 1.0),
        )
        class_weights = options.class_weights
        if class_weights and len(class_weights) != self.num_classes:
            raise ValueError(
                f"MODEL.KEYFRAME.CLASS_WEIGHTS has {len(class_weights)} values for {self.num_classes} classes"
            )
        if options.carry == "queries" and not (propagator.carries_queries and segmentor.has_queries):
            raise ValueError(
                "MODEL.KEYFRAME.CARRY queries needs a segmentor with queries (MaskClassifier, MASK_FORMER.MERGE_AT "
                "mask) and a propagator that carries masks (copy, warp, or gsvnet with VARIANT agnostic)"
            )
        if options.released and (not isinstance(segmentor, ClipSegmentor) or segmentor.looks_back):
            raise ValueError(
                "MODEL.KEYFRAME.RELEASED needs the raw logits of a ClipSegmentor with an image head, not "
                f"{type(segmentor).__name__}"
            )
        self.segmentor = segmentor.requires_grad_(False)
        self.propagator = propagator
        self.policy_name, self.measure, self.gate = policy
        self.options = options
        self.cache = cache
        self.register_buffer("frame_mean", torch.tensor(list(frame_mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("frame_std", torch.tensor(list(frame_std)).view(-1, 1, 1), persistent=False)
        weights = torch.tensor(list(class_weights)) if class_weights else None
        self.register_buffer("class_weights", weights, persistent=False)
        self.train()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        options = KeyframeOptions.from_config(cfg)
        segmentor = build_key_segmentor(cfg, cls.__name__)
        propagator = build_propagator(cfg, segmentor.num_classes)
        return {
            "segmentor": segmentor,
            "propagator": propagator,
            "policy": build_policy(cfg, propagator),
            "frame_mean": cfg.MODEL.PIXEL_MEAN,
            "frame_std": cfg.MODEL.PIXEL_STD,
            "options": options,
            "cache": cache_from_config(cfg),
        }

    @property
    def score_stride(self) -> int:
        """Input pixels per cell of the score maps."""
        return self.options.stride

    def train(self, mode: bool = True) -> Self:
        """Switch the propagator's mode; the segmentor stays in eval mode."""
        super().train(mode)
        self.segmentor.eval()
        return self

    def runtime_parts(self) -> list[tuple[nn.Module, str]]:
        """The key segmentor's parts, and the propagator."""
        return [*self.segmentor.runtime_parts(), (self, "propagator")]

    # Streams.

    @property
    def keyframe_interval(self) -> int:
        """The policy's largest gap."""
        return self.gate.max_gap

    def is_keyframe(self, state: StreamState) -> bool:
        """See :class:`~the_mask.modeling.stream.Stream`."""
        return bool(state["keyframe"])

    def init_state(self) -> StreamState:
        """State of a stream before its first frame; see :mod:`the_mask.modeling.propagation.stream_state`."""
        return self.new_state(**stream_state.new_content(self.segmentor.init_state()))

    def request_keyframe(self, state: StreamState) -> StreamState:
        """The same state, whose next frame will be a keyframe (after a gap or a seek)."""
        self.check_state(state)
        return {**state, "requested": True}

    def step(self, frame: Tensor, state: StreamState, hints: Hints = NO_HINTS) -> tuple[Tensor, StreamState]:
        """Segment the next frame of a stream; ``state["keyframe"]`` of the result tells whether it was a keyframe."""
        scores, states = self.step_many([frame], [state], [hints])
        return scores[0], states[0]

    @torch.no_grad()
    def step_many(
        self,
        frames: Sequence[Tensor],
        states: Sequence[StreamState],
        hints: Sequence[Hints] | None = None,
        defer: bool = False,
    ) -> tuple[list[Tensor], list[StreamState]]:
        """Advance several streams by one frame each: one batch of keyframes, one of propagated frames per size.

        A stream's result does not depend on what else is in the batch.

        Args:
            frames: [3, H, W], RGB 0..255, one per stream.
            states: of :meth:`init_state` or the last step; not changed.
            hints: which frames must be keyframes.
            defer: propagate even where the policy requests a keyframe, and set ``state["requested"]``.

        Returns:
            Probabilities [K, h, w] per stream, and the new states.

        Raises:
            ValueError: a state of another stream, a frame that is not an RGB image, or scores that are not finite.
        """
        hints = [NO_HINTS] * len(frames) if hints is None else hints
        turns = [self._turn(*arguments) for arguments in zip(frames, states, hints, strict=True)]
        free = [turn for turn in turns if not turn.reason]
        if not self.measure.needs:
            self._judge(free)
            free = [turn for turn in free if defer or not turn.reason]
        self._carry(free)
        if self.measure.needs:
            self._judge(free)
        keys = [turn for turn in turns if turn.reason and not (defer and turn.carried is not None)]
        fresh = iter(self._key(keys))
        after = []
        for turn in turns:
            if turn.carried is None or (turn.reason and not defer):
                after.append(next(fresh))
            else:
                after.append({**turn.carried, "policy": turn.state["policy"], "requested": bool(turn.reason)})
        return [self.output(state) for state in after], after

    def _turn(self, frame: Tensor, state: StreamState, hints: Hints) -> _Turn:
        if frame.ndim != 3 or frame.shape[0] != 3 or 0 in frame.shape:
            raise ValueError(f"a frame is RGB [3, H, W], got shape {list(frame.shape)}")
        self.check_hints(hints)
        state = self.continue_state(state, (frame.shape[1], frame.shape[2]))
        reason = "first" if not state["seen"] else "requested" if state["requested"] or hints.keyframe else ""
        return _Turn(frame, self.small_frames([frame])[0], state, reason)

    def _judge(self, turns: Sequence[_Turn]) -> None:
        """Apply the policy to some frames: sets ``reason`` and the policy's part of ``state``."""
        for turn in turns:
            state = turn.state
            value = self.measure(turn.small[None], state["frame"][None], turn.detail)
            verdict, policy = decide(self.gate, state["policy"], float(value), state["since_key"] + 1)
            turn.state = {**state, "policy": policy}
            turn.reason = self.policy_name if verdict == "measure" else verdict

    def _carry(self, turns: Sequence[_Turn]) -> None:
        """Propagate some frames: sets ``carried`` and ``detail``."""
        results = self._propagate([turn.small for turn in turns], [turn.state for turn in turns])
        for turn, (state, detail) in zip(turns, results, strict=True):
            turn.carried, turn.detail = state, detail

    def small_frames(self, frames: Sequence[Tensor]) -> list[Tensor]:
        """Frames [3, H, W] of any dtype -> small RGB frames [3, h, w], float 0..255, on the model's device."""
        return [
            geometry.downscale_frames(frame[None].to(self.device), self.options.stride, self.options.released)[0]
            for frame in frames
        ]

    @torch.no_grad()
    def key_step(
        self, frames: Sequence[Tensor], states: Sequence[StreamState], reasons: Sequence[str] | None = None
    ) -> list[StreamState]:
        """Make keyframes of the streams' next frames.

        Args:
            frames: [3, H, W], RGB 0..255.
            states: of streams before these frames.
            reasons: values of ``state["reason"]``; "requested" by default.

        Raises:
            ValueError: scores that are not finite.
        """
        reasons = ["requested"] * len(frames) if reasons is None else reasons
        turns = [self._turn(frame, state, NO_HINTS) for frame, state in zip(frames, states, strict=True)]
        return self._key([replace(turn, reason=reason) for turn, reason in zip(turns, reasons, strict=True)])

    def _key(self, turns: Sequence[_Turn]) -> list[StreamState]:
        """States after keyframes."""
        if not self.segmentor.looks_back and self.options.carry == "classes":
            maps = self._key_maps([turn.frame for turn in turns])
            return [
                stream_state.after_key(turn.state, turn.small, scores, turn.state["segmentor"], turn.reason)
                for turn, scores in zip(turns, maps, strict=True)
            ]
        after = []
        for turn in turns:
            scores, inner, queries = self._key_in_stream(turn.frame, turn.state["segmentor"])
            after.append(stream_state.after_key(turn.state, turn.small, scores, inner, turn.reason, queries))
        return after

    @torch.no_grad()
    def propagate(self, smalls: Sequence[Tensor], states: Sequence[StreamState]) -> list[StreamState]:
        """Propagate the streams' scores to their next frames, given as :meth:`small_frames`, without any keyframe.

        Raises:
            ValueError: a state without scores, that is before its first keyframe, or a small frame of another size.
        """
        return [state for state, _ in self._propagate(smalls, states)]

    def output(self, state: StreamState) -> Tensor:
        """Probabilities [K, h, w] of a stream's last frame, float32."""
        scores = state["scores"].float()
        check_finite(scores, f"frame {state['seen'] - 1} of a stream", ())
        if self.options.released:
            height, width = state["size"]
            scores = geometry.from_aligned_grid(scores, (height, width), self.options.stride)
        return scores.softmax(dim=0)

    def _propagate(
        self, smalls: Sequence[Tensor], states: Sequence[StreamState]
    ) -> list[tuple[StreamState, Propagated]]:
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (small, state) in enumerate(zip(smalls, states, strict=True)):
            if state["frame"].shape != small.shape:
                raise ValueError(
                    f"a small frame of {list(small.shape)} cannot follow one of {list(state['frame'].shape)}: start "
                    "with a keyframe"
                )
            groups[(*small.shape, state["queries"].shape[0])].append(i)
        results: dict[int, tuple[StreamState, Propagated]] = {}
        for (*_, num_queries), members in groups.items():
            result = self.propagator(
                torch.stack([states[i]["scores"] for i in members]),
                self.normalise(torch.stack([smalls[i] for i in members])),
                self.normalise(torch.stack([states[i]["frame"] for i in members])),
                torch.stack([states[i]["queries"] for i in members]) if num_queries else None,
            )
            for row, i in enumerate(members):
                one = result.row(row)
                masks = None if one.queries is None else one.queries[0]
                results[i] = stream_state.after_propagation(states[i], smalls[i], one.scores[0], masks), one
        return [results[i] for i in range(len(states))]

    def normalise(self, smalls: Tensor) -> Tensor:
        """Normalise small frames [B, 3, h, w], RGB 0..255, for the propagator."""
        frames = (smalls - self.frame_mean) / self.frame_std
        return frames.flip(1) if self.options.released else frames

    # Keyframes.

    @property
    def _grid(self) -> CarriedGrid:
        options = self.options
        return CarriedGrid(options.stride, self.segmentor.score_stride, options.key_scale, options.released)

    def _key_maps(self, frames: Sequence[Tensor]) -> list[Tensor]:
        """Carried scores [K, h, w] of keyframes of a segmentor that does not look back, in one batch per size."""
        clips = [Clip([self._grid.key_input(frame)]) for frame in frames]
        maps = [self._raw_logits(clip) for clip in clips] if self.options.released else self.segmentor.score_maps(clips)
        return [self._grid.scores(scores[0], frame) for scores, frame in zip(maps, frames, strict=True)]

    def _raw_logits(self, clip: Clip) -> Tensor:
        """Logits [1, K, h', w'] of a clip of one frame."""
        segmentor = self.segmentor
        assert isinstance(segmentor, ClipSegmentor)
        images, _ = segmentor.stack([clip])
        return segmentor.crop_scores(segmentor.image_logits(images), *clip.frame_size)

    def _key_in_stream(
        self, frame: Tensor, state: StreamState
    ) -> tuple[Tensor, StreamState, tuple[Tensor, Tensor] | None]:
        grid, pixels = self._grid, self._grid.key_input(frame)
        if self.options.carry == "classes":
            scores, state = self.segmentor.step(pixels, state)
            return grid.scores(scores, frame), state, None
        scores, classes, masks, state = self.segmentor.step_queries(pixels, state)
        return grid.scores(scores, frame), state, (classes, grid.masks(masks, frame))

    # Clips.

    def group_scores(self, images: Tensor, num_frames: int) -> Iterable[Tensor]:
        """Scores of clips, each a stream of its own from its first frame; images are raw frames [B*T, 3, H, W]."""
        clips = images.unflatten(0, (-1, num_frames))
        states = [self.init_state() for _ in clips]
        scores = []
        for frames in clips.unbind(dim=1):
            maps, states = self.step_many(list(frames), states)
            scores.append(torch.stack(maps))
        return torch.stack(scores, dim=1)

    def losses(self, clips: Sequence[Clip]) -> dict[str, Tensor]:
        """Losses of the last frame of clips, reached from a keyframe some frames before it.

        The distance is drawn from ``MODEL.KEYFRAME.DISTANCES``, one per iteration.

        Raises:
            ValueError: clips too short for the largest distance, or without labels on the last frame.
        """
        distance = training.draw_distance(self.options.distances, self.iteration)
        shortest = min(len(clip) for clip in clips)
        distances = self.options.distances
        if shortest <= max(distances):
            raise ValueError(
                f"clips of {shortest} frames are too short for MODEL.KEYFRAME.DISTANCES {list(distances)}: set "
                f"INPUT.CLIP.DILATIONS to the {max(distances)} frames before the labelled one"
            )
        unlabelled = [clip.name for clip in clips if clip.labels[-1] is None]
        if unlabelled:
            raise ValueError(
                f"no labels on the last frame of clips {', '.join(unlabelled)}: INPUT.CLIP.DILATIONS may only have "
                "frames before the labelled one"
            )
        images, _ = self.stack([clip.window(len(clip) - distance - 1, len(clip)) for clip in clips])
        frames = images.unflatten(0, (len(clips), distance + 1))
        size = (images.shape[-2], images.shape[-1])
        labels = stack_labels(clips, -1, self.num_classes, self.ignore_label, size).to(self.device)
        smalls = geometry.downscale_frames(images, self.options.stride, self.options.released).unflatten(
            0, frames.shape[:2]
        )
        small = [self.normalise(frame) for frame in smalls.unbind(dim=1)]

        with torch.no_grad():
            scores = self._training_maps(clips, frames[:, 0], -distance - 1)
        result = training.unroll(self.propagator, scores, small, self.options.unroll)
        logits = training.upsample(result.scores, size, self.options.stride, self.options.released)
        loss = training.segmentation_loss(logits, labels, self.ignore_label, self.class_weights)
        losses = {"loss_ce": loss * self.options.loss_weight}
        if self.options.distill_weight:
            with torch.no_grad():
                teacher = self._training_maps(clips, frames[:, -1], -1)
            losses["loss_distill"] = training.distillation_loss(result.scores, teacher) * self.options.distill_weight
        return losses

    def _training_maps(self, clips: Sequence[Clip], frames: Tensor, position: int) -> Tensor:
        """Carried scores [B, K, h, w] of one frame per clip, from the cache where there is one."""
        if self.cache is None:
            return torch.stack(self._key_maps(list(frames)))
        maps = [self.cache.read(clip, position, self.segmentor) for clip in clips]
        missing = [i for i, scores in enumerate(maps) if scores is None]
        for i, scores in zip(missing, self._key_maps([frames[i] for i in missing]), strict=True):
            maps[i] = self.cache.write(clips[i], position, scores)
        return torch.stack([scores.to(frames) for scores in maps if scores is not None])
