"""How the frames of several streams are segmented together: one batch of keyframes, one of all others.

A stream's result does not depend on what else is in the batch; its state is a plain dict that the caller keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from the_mask.inference.live.sources import Frame
from the_mask.inference.stream import StreamingSegmentor
from the_mask.modeling.propagation.propagated import PropagatedSegmentor, looks_back
from the_mask.modeling.segmentor import Segmentor

State = Any
# Frames that are carried on an old keyframe at most while a new one is computed beside, without a policy's limit.
MAX_BEHIND = 8


class Job(NamedTuple):
    """The next frame of a stream, its state before it, and whether it should be a keyframe."""

    stream: str
    image: Frame
    state: State
    request_key: bool = False


class Done(NamedTuple):
    """Labels or scores, the state after the frame, and whether it rests on a new keyframe (None: not told)."""

    output: Tensor
    state: State
    keyframe: bool | None


class Backend:
    """Runs any runner, stream after stream. Subclasses know more about their model and batch.

    Attributes:
        interval: most frames from one keyframe to the next; 0 without keyframes or without a limit.
    """

    interval = 0

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def init_state(self) -> State:
        """State of a stream before its first frame."""
        return self.runner.init_state()

    def step(self, jobs: Sequence[Job]) -> list[Done]:
        """Segment one frame of each of some streams."""
        done = []
        for job in jobs:
            output, state = self.runner.step(job.image, job.state)
            done.append(Done(torch.as_tensor(output), state, None))
        return done

    def forget(self, stream: str) -> None:
        """Drop what is in preparation for a stream."""

    def close(self) -> None:
        """End threads, if there are any."""


class ImageBackend(Backend):
    """A segmentor that looks at one frame at a time: frames of all streams in one batch per size."""

    runner: StreamingSegmentor

    def step(self, jobs: Sequence[Job]) -> list[Done]:
        pixels = [self.runner.prepare(job.image) for job in jobs]
        scores = self.runner.model.score_maps([{"frames": [x]} for x in pixels])
        return [
            Done(self.runner.finish(s[0], _size(x), job.image.shape[:2]), _wrap(job, job.state["model"]), None)
            for job, x, s in zip(jobs, pixels, scores, strict=True)
        ]


@dataclass
class _Pending:
    """A keyframe under way, and the small frames since."""

    future: Future[State]
    smalls: list[Tensor] = field(default_factory=list)


class PropagationBackend(Backend):
    """A ``PropagatedSegmentor``: keyframes in one batch, propagated frames in another.

    With ``asynchronous`` keyframes are computed in a thread of their own (on a CUDA device, in a stream of its own)
    while their stream goes on from the old one; a finished keyframe is carried forward through the frames that came
    since and takes over. Latency is then even, and a keyframe's result some frames late. A stream's first keyframe, and
    the first after a reset, is always waited for, as is one that is ``MAX_BEHIND`` frames (or the policy's largest gap)
    late.
    """

    runner: StreamingSegmentor

    def __init__(self, runner: StreamingSegmentor, asynchronous: bool = False) -> None:
        super().__init__(runner)
        self.model = runner.model
        self.interval = self.model.gate.max_gap
        self.limit = self.interval or MAX_BEHIND
        self.pending: dict[str, _Pending] = {}
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="keyframes") if asynchronous else None
        self.side = torch.cuda.Stream() if asynchronous and self.model.device.type == "cuda" else None

    def step(self, jobs: Sequence[Job]) -> list[Done]:
        pixels = [self.runner.prepare(job.image) for job in jobs]
        states = [job.state["model"] for job in jobs]
        if self.executor is None:
            for i, job in enumerate(jobs):
                if job.request_key:
                    states[i] = self.model.request_keyframe(states[i])
            scores, states = self.model.step_many(pixels, states)
            keys = [state["keyframe"] for state in states]
        else:
            scores, states, keys = self._step_beside(jobs, pixels, states)
        return [
            Done(self.runner.finish(s, _size(x), job.image.shape[:2]), _wrap(job, state), key)
            for job, x, s, state, key in zip(jobs, pixels, scores, states, keys, strict=True)
        ]

    def forget(self, stream: str) -> None:
        pending = self.pending.pop(stream, None)
        if pending is not None:
            pending.future.cancel()

    def close(self) -> None:
        self.pending.clear()
        if self.executor is not None:
            self.executor.shutdown(wait=True, cancel_futures=True)

    def _step_beside(
        self, jobs: Sequence[Job], pixels: Sequence[Tensor], states: Sequence[State]
    ) -> tuple[list[Tensor], list[State], list[bool]]:
        scores: dict[int, Tensor] = {}
        after: dict[int, State] = {}
        keys = [False] * len(jobs)
        free = [i for i, job in enumerate(jobs) if job.stream not in self.pending]
        if free:
            outputs, new = self.model.step_many([pixels[i] for i in free], [states[i] for i in free], defer=True)
            for i, output, state in zip(free, outputs, new, strict=True):
                keys[i] = state["keyframe"]
                if not keys[i] and (state["requested"] or jobs[i].request_key):
                    before = {**states[i], "policy": state["policy"]}
                    assert self.executor is not None
                    self.pending[jobs[i].stream] = _Pending(self.executor.submit(self._key, pixels[i], before))
                    state = {**state, "requested": False}
                scores[i], after[i] = output, state
        late: list[int] = []
        for i in (i for i in range(len(jobs)) if i not in after):
            pending = self.pending[jobs[i].stream]
            pending.smalls += self.model.small_frames([pixels[i]])
            if pending.future.done() or len(pending.smalls) >= self.limit:
                state = pending.future.result()
                for small in pending.smalls:
                    (state,) = self.model.propagate([small], [state])
                del self.pending[jobs[i].stream]
                after[i], keys[i] = state, True
            else:
                late.append(i)
        if late:
            smalls = [self.pending[jobs[i].stream].smalls[-1] for i in late]
            after |= zip(late, self.model.propagate(smalls, [states[i] for i in late]), strict=True)
        for i, state in after.items():
            if i not in scores:
                scores[i] = self.model.output(state)
        order = range(len(jobs))
        return [scores[i] for i in order], [after[i] for i in order], keys

    def _key(self, pixels: Tensor, state: State) -> State:
        """Run in the side thread."""
        if self.side is None:
            return self.model.key_step([pixels], [state])[0]
        self.side.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(self.side):
            result = self.model.key_step([pixels], [state])[0]
        self.side.synchronize()
        return result


def make_backend(runner: Any, asynchronous: bool = False) -> Backend:
    """The backend that suits a runner (anything with ``init_state()`` and ``step(frame, state)``).

    Raises:
        ValueError: ``asynchronous`` for a model without keyframes.
    """
    model = runner.model if isinstance(runner, StreamingSegmentor) else None
    if isinstance(model, PropagatedSegmentor):
        return PropagationBackend(runner, asynchronous)
    if asynchronous:
        raise ValueError("asynchronous keyframes need a PropagatedSegmentor; this model segments every frame in full")
    if isinstance(model, Segmentor) and not looks_back(model):
        return ImageBackend(runner)
    return Backend(runner)


def _size(pixels: Tensor) -> tuple[int, int]:
    return pixels.shape[1], pixels.shape[2]


def _wrap(job: Job, model_state: State) -> State:
    """A state of ``StreamingSegmentor``; the engine resets it where sizes change, so it counts nothing here."""
    return {"size": list(job.image.shape[:2]), "resets": job.state["resets"], "model": model_state}
