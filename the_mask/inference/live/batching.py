"""Segments the frames of several streams together: one batch of keyframes, one of all other frames.

A stream's result does not depend on the rest of the batch. Its state is a plain dict that the caller keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from the_mask.inference.live.frame_source import Frame
from the_mask.inference.views import MultiView
from the_mask.modeling.propagation.propagated import PropagatedSegmentor
from the_mask.modeling.stream import NO_HINTS, Hints, Stream, StreamState

# Largest number of frames propagated from an old keyframe while a new one is computed in a background thread, if the
# policy has no limit.
MAX_BEHIND = 8


class Job(NamedTuple):
    """The next frame of a stream, the state before it, and hints about the frame."""

    stream: str
    image: Frame
    state: StreamState
    hints: Hints = NO_HINTS


class Done(NamedTuple):
    """Labels or scores, the state after the frame, and whether a new keyframe was used (None: no keyframes)."""

    output: Tensor
    state: StreamState
    keyframe: bool | None


class Batcher:
    """Advances streams together, in as few batches as the model allows."""

    def __init__(self, stream: Stream) -> None:
        if not isinstance(stream, Stream):
            raise ValueError(f"{type(stream).__name__} is no the_mask.modeling.stream.Stream: subclass it")
        self.stream = stream

    def step(self, jobs: Sequence[Job]) -> list[Done]:
        """Segment one frame of each of some streams."""
        _, images, states, hints = zip(*jobs, strict=True)
        outputs, after = self.stream.step_many(images, states, hints)
        return [
            Done(output, state, self.stream.is_keyframe(state)) for output, state in zip(outputs, after, strict=True)
        ]

    def forget(self, name: str) -> None:
        """Drop the pending keyframe of a stream."""

    def close(self) -> None:
        """End background threads, if any."""


@dataclass(frozen=True)
class _Pending:
    """A keyframe that is being computed.

    Attributes:
        key: the state after it.
        latest: the same, propagated through the frames that came since.
        frames: their number.
    """

    key: Future[StreamState]
    latest: Future[StreamState]
    frames: int = 0


@dataclass
class _Turn:
    """One stream's frame while :meth:`BackgroundKeyframes.step` processes it.

    Attributes:
        pixels: network input.
        state: the model's state before the frame, later after it.
        pending: the keyframe that the stream waits for after the frame.
        scores: None until they are computed.
        keyframe: whether a new keyframe was used.
    """

    name: str
    pixels: Tensor
    state: StreamState
    hints: Hints
    pending: _Pending | None
    scores: Tensor | None = None
    keyframe: bool = False


class BackgroundKeyframes(Batcher):
    """Computes the keyframes of ``PropagatedSegmentor`` streams in a background thread (with its own CUDA stream).

    Meanwhile a stream continues from the old keyframe. When the new one is done, it is propagated through the frames
    that came since, in the background too, and replaces the old one. Latency is then even, but a keyframe's result
    comes some frames late. The first keyframe of a stream or after a reset is always waited for, and so is one that is
    ``MAX_BEHIND`` frames (or the policy's largest gap) late.

    Raises:
        ValueError: a model without keyframes, or several views.
    """

    stream: MultiView

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        model = stream.model if isinstance(stream, MultiView) and stream.is_single else None
        if not isinstance(model, PropagatedSegmentor):
            raise ValueError(
                "asynchronous keyframes need a PropagatedSegmentor with a single view; this model segments every frame "
                "in full"
            )
        self.model = model
        self.limit = model.keyframe_interval or MAX_BEHIND
        self.pending: dict[str, _Pending] = {}
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="keyframes")
        self.side = torch.cuda.Stream() if model.device.type == "cuda" else None

    def step(self, jobs: Sequence[Job]) -> list[Done]:
        """See :class:`Batcher`. Pending keyframes change only if all streams advance."""
        turns: list[_Turn] = []

        def advance(
            pixels: list[Tensor], states: list[StreamState], hints: Sequence[Hints]
        ) -> tuple[list[Tensor], list[StreamState]]:
            for job, x, state, hint in zip(jobs, pixels, states, hints, strict=True):
                turns.append(_Turn(job.stream, x, state, hint, self.pending.get(job.stream)))
            self._start([turn for turn in turns if turn.pending is None])
            self._go_on([turn for turn in turns if turn.scores is None])
            return [turn.scores for turn in turns if turn.scores is not None], [turn.state for turn in turns]

        _, images, states, hints = zip(*jobs, strict=True)
        outputs, after = self.stream.step_many(images, states, hints, advance)
        for turn in turns:
            self.pending.pop(turn.name, None)
            if turn.pending is not None:
                self.pending[turn.name] = turn.pending
        return [Done(output, state, turn.keyframe) for output, state, turn in zip(outputs, after, turns, strict=True)]

    def forget(self, name: str) -> None:
        pending = self.pending.pop(name, None)
        if pending is not None:
            pending.key.cancel()
            pending.latest.cancel()

    def close(self) -> None:
        self.pending.clear()
        self.executor.shutdown(wait=True, cancel_futures=True)

    def _start(self, turns: Sequence[_Turn]) -> None:
        """Streams without a pending keyframe: one step each; start a keyframe in the background where one is due."""
        if not turns:
            return
        scores, states = self.model.step_many([t.pixels for t in turns], [t.state for t in turns], defer=True)
        for turn, output, state in zip(turns, scores, states, strict=True):
            turn.keyframe = state["keyframe"]
            if not turn.keyframe and (state["requested"] or turn.hints.keyframe):
                before = {**turn.state, "policy": state["policy"]}
                key = self.executor.submit(self._key, turn.pixels, before)
                turn.pending = _Pending(key, key)
                state = {**state, "requested": False}
            turn.scores, turn.state = output, state

    def _go_on(self, turns: Sequence[_Turn]) -> None:
        """Streams with a pending keyframe: use it if it is done (or wait if it is too late), else continue without."""
        late = []
        for turn in turns:
            pending = turn.pending
            assert pending is not None
            (small,) = self.model.small_frames([turn.pixels])
            if pending.key.done() or pending.frames + 1 >= self.limit:
                (turn.state,) = self.model.propagate([small], [pending.latest.result()])
                turn.pending, turn.keyframe = None, True
            else:
                latest = self.executor.submit(self._follow, small, pending.latest)
                turn.pending = _Pending(pending.key, latest, pending.frames + 1)
                late.append((turn, small))
        states = self.model.propagate([small for _, small in late], [turn.state for turn, _ in late])
        for (turn, _), state in zip(late, states, strict=True):
            turn.state = state
        for turn in turns:
            turn.scores = self.model.output(turn.state)

    def _key(self, pixels: Tensor, state: StreamState) -> StreamState:
        """Compute a keyframe, in the background thread."""
        return self._aside(lambda: self.model.key_step([pixels], [state])[0])

    def _follow(self, small: Tensor, before: Future[StreamState]) -> StreamState:
        """Propagate a keyframe to the next frame, in the background thread, which has computed it by then."""
        return self._aside(lambda: self.model.propagate([small], [before.result()])[0])

    def _aside(self, work: Callable[[], StreamState]) -> StreamState:
        if self.side is None:
            return work()
        self.side.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(self.side):
            result = work()
        self.side.synchronize()
        return result
