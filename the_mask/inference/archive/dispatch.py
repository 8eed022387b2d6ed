"""Distributes the videos of an archive to workers: one at a time to each, again if a worker dies; records results.

Only the process that runs :func:`segment_archive` writes results, and it takes one outcome per video. If a worker
has died or cannot be reached, the folder of its attempt is removed before the next attempt begins, so that a worker
that is still alive cannot leave partial results.
"""

from __future__ import annotations

import logging
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tqdm import tqdm

from the_mask.data.files import TEMPORARY
from the_mask.inference.archive.manifest import VideoTask
from the_mask.inference.archive.results import DONE, FAILED, Results, discard
from the_mask.inference.archive.worker import FAILURE, INPUT, MEMORY, Outcome

logger = logging.getLogger(__name__)
# Give up after a worker died this often in a row before it was ready.
FAILED_STARTS = 3
LOG_SECONDS = 10.0
# Seconds without any ready worker until a warning.
WAIT_SECONDS = 60.0
LESS_MEMORY = "fewer workers (--workers), smaller frames (INPUT.TEST.SHORT_EDGE, LONG_EDGE) or --precision bfloat16"


@dataclass(frozen=True)
class Event:
    """Something that happened to a worker.

    Attributes:
        worker: its number.
        kind: "ready" (the model is built), "refused" (it cannot be; ``message`` is for the user), "finished" (the
            video; see ``outcome``), "died" (``message`` says how).
    """

    worker: int
    kind: str
    message: str = ""
    outcome: Outcome | None = None
    # For "died": whether a lack of memory may be the reason.
    memory: bool = False


class Workers(Protocol):
    """Workers by number; one that has died is started again under the same number."""

    count: int

    def start(self, worker: int) -> None:
        """Begin to start a worker; a "ready", "refused" or "died" follows. A running one is stopped first."""

    def submit(self, worker: int, task: VideoTask, staging: str) -> None:
        """Give a ready worker a video; a "finished" or "died" follows."""

    def wait(self, seconds: float) -> list[Event]:
        """Events since the last call; waits at most ``seconds`` for the first one."""

    def close(self) -> None:
        """Stop all workers immediately."""


@dataclass
class Summary:
    """Result of a run: numbers of videos, frames segmented in this run, and errors by manifest line."""

    done: int = 0
    before: int = 0
    failed: int = 0
    frames: int = 0
    seconds: float = 0.0
    errors: dict[int, str] = field(default_factory=dict)


def segment_archive(
    tasks: Sequence[VideoTask],
    results: Results,
    workers: Workers,
    *,
    retries: int = 2,
    progress: bool = True,
) -> Summary:
    """Segment all videos that are not done yet.

    Args:
        tasks: of :func:`the_mask.inference.archive.read_manifest`.
        results: of the output folder.
        workers: closed at the end, also after errors.
        retries: further attempts at a video whose worker died or failed; errors of the video itself are not retried.
        progress: show a bar when standard error is a terminal, or else log a line every ten seconds.

    Raises:
        ValueError: no worker can be started.
    """
    start = time.perf_counter()
    todo = [task for task in tasks if not results.done(task)]
    run = _Run(results, workers, retries, _Progress(len(todo), progress))
    run.summary.before = len(tasks) - len(todo)
    try:
        if todo:
            run.all(todo)
    finally:
        workers.close()
        run.progress.close()
        for _, staging in run.busy.values():
            discard(results.folder / staging)
    run.summary.seconds = time.perf_counter() - start
    return run.summary


class _Run:
    def __init__(self, results: Results, workers: Workers, retries: int, progress: _Progress) -> None:
        self.results, self.workers, self.retries, self.progress = results, workers, retries, progress
        self.summary = Summary()
        self.busy: dict[int, tuple[VideoTask, str]] = {}
        self._waiting: deque[VideoTask] = deque()
        # Videos that may have run out of memory: they get their next attempt when nothing else runs.
        self._alone: deque[VideoTask] = deque()
        self._idle: set[int] = set()
        self._attempts: Counter[int] = Counter()
        # How often a worker died while starting, by its number.
        self._failed_starts: Counter[int] = Counter()

    def all(self, tasks: Sequence[VideoTask]) -> None:
        self._waiting.extend(tasks)
        for worker in range(min(self.workers.count, len(tasks))):
            self.workers.start(worker)
        since = time.monotonic()
        while self._waiting or self._alone or self.busy:
            self._submit()
            for event in self.workers.wait(1.0):
                self._handle(event)
                since = time.monotonic()
            if not self.busy and not self._idle and time.monotonic() - since > WAIT_SECONDS:
                logger.warning("no worker has been ready for %d s: they wait for a free device", WAIT_SECONDS)
                since = time.monotonic()

    def _submit(self) -> None:
        for worker in sorted(self._idle):
            if self._waiting:
                task = self._waiting.popleft()
            elif self._alone and not self.busy:
                task = self._alone.popleft()
            else:
                return
            self._attempts[task.line] += 1
            staging = f".{uuid.uuid4().hex}{TEMPORARY}"
            self._idle.remove(worker)
            self.busy[worker] = (task, staging)
            self.workers.submit(worker, task, staging)

    def _handle(self, event: Event) -> None:
        if event.kind == "refused":
            raise ValueError(event.message)
        if event.kind == "ready":
            self._failed_starts[event.worker] = 0
            self._idle.add(event.worker)
            return
        if event.worker not in self.busy:
            self._failed_starts[event.worker] += event.worker not in self._idle
            if self._failed_starts[event.worker] >= FAILED_STARTS:
                raise ValueError(f"a worker dies before it can start: {event.message}; try {LESS_MEMORY}")
            self._idle.discard(event.worker)
            self.workers.start(event.worker)
            return
        task, staging = self.busy.pop(event.worker)
        outcome = event.outcome
        if outcome is None:
            outcome = Outcome(f"its worker died: {event.message}", MEMORY if event.memory else FAILURE)
        # First stop whatever the attempt may still be doing.
        discard(self.results.folder / staging)
        if outcome.kind in (MEMORY, FAILURE):
            # The error may have left the process in a bad state.
            self.workers.start(event.worker)
        else:
            self._idle.add(event.worker)
        self._note(task, outcome)

    def _note(self, task: VideoTask, outcome: Outcome) -> None:
        attempts = self._attempts[task.line]
        if not outcome.error:
            self._check_outputs(task, outcome)
            facts = {"frames": outcome.frames, "seconds": outcome.seconds, "sha256": outcome.digests}
            if outcome.problems:
                facts["problems"] = outcome.problems
            self.results.add(task, DONE, {**facts, "attempts": attempts, "worker": outcome.worker})
            self.summary.done += 1
            self.summary.frames += outcome.frames
        elif outcome.kind != INPUT and attempts <= self.retries:
            logger.warning("%s, attempt %d: %s; it is tried again", task.video, attempts, outcome.error)
            (self._alone if outcome.kind == MEMORY else self._waiting).append(task)
            return
        else:
            error = outcome.error
            if outcome.kind == MEMORY:
                error += f"; if memory ran out, try {LESS_MEMORY}"
            logger.warning("%s failed: %s", task.video, error)
            self.results.add(task, FAILED, {"error": error, "attempts": attempts, "worker": outcome.worker})
            self.summary.failed += 1
            self.summary.errors[task.line] = error
        self.progress.update(self.summary)

    def _check_outputs(self, task: VideoTask, outcome: Outcome) -> None:
        absent = [name for name in task.outputs if not (self.results.folder / name).exists()]
        if absent:
            raise ValueError(
                f"worker {outcome.worker} has written {absent[0]}, but {self.results.folder} does not have it here: "
                "the output folder must be on a file system that all machines share"
            )


class _Progress:
    """A bar of videos on a terminal, else a line every ten seconds."""

    def __init__(self, total: int, shown: bool) -> None:
        self._shown, self._total = shown, total
        self._start = self._last = time.perf_counter()
        self._bar = tqdm(total=total, unit="video", disable=not (shown and sys.stderr.isatty()))

    def update(self, summary: Summary) -> None:
        """After each video."""
        now, count = time.perf_counter(), summary.done + summary.failed
        rate = summary.frames / (now - self._start)
        self._bar.set_postfix_str(f"{rate:.1f} frames/s, {summary.failed} failed", refresh=False)
        self._bar.update(count - self._bar.n)
        if self._shown and self._bar.disable and now - self._last > LOG_SECONDS:
            self._last = now
            left = (now - self._start) / count * (self._total - count)
            logger.info(
                f"{count}/{self._total} videos, {summary.failed} failed, {rate:.1f} frames/s, {left:.0f} s left"
            )

    def close(self) -> None:
        """Close the bar, leaving it visible."""
        self._bar.close()
