"""How the frames of several streams are segmented together: one batch of keyframes, one of all others.

A stream's result does not depend on what else is in the batch; its state is a plain dict that the caller keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from the_mask.inference.live.sources import Frame
from the_mask.inference.views import MultiView
from the_mask.modeling.propagation.propagated import PropagatedSegmentor
from the_mask.modeling.stream import NO_HINTS, Hints, Stream, StreamState

# Frames that are carried on an old keyframe at most while a new one is computed in the background, without a policy's
# limit.
MAX_BEHIND = 8


class Job(NamedTuple):
    """The next frame of a stream, its state before it, and what is known about the frame."""

    stream: str
    image: Frame
    state: StreamState
    hints: Hints = NO_HINTS


class Done(NamedTuple):
    """Labels or scores, the state after the frame, and whether it rests on a new keyframe (None: there are none)."""

    output: Tensor
    state: StreamState
    keyframe: bool | None


class Batcher:
    """Advances streams together, as far as the model can batch them."""

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
        """Drop what is in preparation for a stream."""

    def close(self) -> None:
        """End threads, if there are any."""


@dataclass(frozen=True)
class _Pending:
    """A keyframe under way, and the small frames since."""

    future: Future[StreamState]
    smalls: tuple[Tensor, ...] = ()


@dataclass
class _Turn:
    """One stream's frame on its way through :meth:`BackgroundKeyframes.step`.

    Attributes:
        pixels: network input.
        state: of the model, before the frame, then after it.
        pending: what the stream waits for after the frame.
        scores: None until they are known.
        keyframe: whether the frame rests on a new keyframe.
    """

    name: str
    pixels: Tensor
    state: StreamState
    hints: Hints
    pending: _Pending | None
    scores: Tensor | None = None
    keyframe: bool = False


class BackgroundKeyframes(Batcher):
    """Streams of a ``PropagatedSegmentor`` whose keyframes are computed in a thread (on CUDA in a stream of its own).

    Meanwhile a stream goes on from the old keyframe; the new one is carried forward through the frames that came since
    and takes over. Latency is then even, and a keyframe's result some frames late. A stream's first keyframe, and the
    first after a reset, is always waited for, as is one that is ``MAX_BEHIND`` frames (or the policy's largest gap)
    late.

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
        """See :class:`Batcher`. What is pending changes only if all streams advance."""
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
            pending.future.cancel()

    def close(self) -> None:
        self.pending.clear()
        self.executor.shutdown(wait=True, cancel_futures=True)

    def _start(self, turns: Sequence[_Turn]) -> None:
        """Streams that wait for nothing: one step each, and a keyframe in the background where one is due."""
        if not turns:
            return
        scores, states = self.model.step_many([t.pixels for t in turns], [t.state for t in turns], defer=True)
        for turn, output, state in zip(turns, scores, states, strict=True):
            turn.keyframe = state["keyframe"]
            if not turn.keyframe and (state["requested"] or turn.hints.keyframe):
                before = {**turn.state, "policy": state["policy"]}
                turn.pending = _Pending(self.executor.submit(self._key, turn.pixels, before))
                state = {**state, "requested": False}
            turn.scores, turn.state = output, state

    def _go_on(self, turns: Sequence[_Turn]) -> None:
        """Streams that wait for a keyframe: they take it over if it is done or too late, or go on without it."""
        late = []
        for turn in turns:
            pending = turn.pending
            assert pending is not None
            pending = replace(pending, smalls=(*pending.smalls, *self.model.small_frames([turn.pixels])))
            if pending.future.done() or len(pending.smalls) >= self.limit:
                turn.state = pending.future.result()
                for small in pending.smalls:
                    (turn.state,) = self.model.propagate([small], [turn.state])
                turn.pending, turn.keyframe = None, True
            else:
                turn.pending = pending
                late.append((turn, pending.smalls[-1]))
        states = self.model.propagate([small for _, small in late], [turn.state for turn, _ in late])
        for (turn, _), state in zip(late, states, strict=True):
            turn.state = state
        for turn in turns:
            turn.scores = self.model.output(turn.state)

    def _key(self, pixels: Tensor, state: StreamState) -> StreamState:
        """Run in the background thread."""
        if self.side is None:
            return self.model.key_step([pixels], [state])[0]
        self.side.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(self.side):
            result = self.model.key_step([pixels], [state])[0]
        self.side.synchronize()
        return result
