"""Workers that are processes of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from the_mask.inference.archive.dispatch import Event
from the_mask.inference.archive.manifest import VideoTask
from the_mask.inference.archive.worker import VideoWorker, WorkerSetup
from the_mask.ops.threads import threads_per_process


class LocalWorkers:
    """One process per worker, with a pipe to each. With more workers than GPUs, some share one."""

    def __init__(
        self, setup: WorkerSetup, count: int = 0, device: str = "cpu", worker: type[VideoWorker] = VideoWorker
    ) -> None:
        """Prepare; no process is started yet.

        Args:
            setup: of the workers; with ``threads`` 0 the machine's cores are divided evenly.
            count: 0 takes one per GPU, or one on the CPU.
            device: ``MODEL.DEVICE``.
            worker: class that runs in the processes.
        """
        gpus = torch.cuda.device_count() if device == "cuda" else 0
        self.count = count or max(1, gpus)
        self._setup = dataclasses.replace(setup, threads=setup.threads or threads_per_process(self.count))
        self._devices = [f"cuda:{i}" for i in range(gpus)] or [device]
        self._worker = worker
        # Not fork: threads and CUDA do not survive it.
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[int, tuple[BaseProcess, Connection]] = {}

    def start(self, worker: int) -> None:
        self._end(worker)
        ours, theirs = self._context.Pipe()
        device = self._devices[worker % len(self._devices)]
        process = self._context.Process(
            target=_serve, args=(theirs, self._worker, self._setup, device), name=f"segment {worker}", daemon=True
        )
        process.start()
        theirs.close()
        self._processes[worker] = process, ours

    def submit(self, worker: int, task: VideoTask, staging: str) -> None:
        # A worker that has just died is found by wait().
        with contextlib.suppress(OSError):
            self._processes[worker][1].send((task, staging))

    def wait(self, seconds: float) -> list[Event]:
        pipes = {pipe: worker for worker, (_, pipe) in self._processes.items()}
        events = []
        for ready in wait(list(pipes), seconds):
            pipe: Any = ready
            worker = pipes[pipe]
            try:
                events.append(Event(worker, **pipe.recv()))
            except (EOFError, OSError):
                events.append(self._died(worker))
        return events

    def _died(self, worker: int) -> Event:
        process, _ = self._processes[worker]
        process.join()
        code = process.exitcode or 0
        self._end(worker)
        if code >= 0:
            return Event(worker, "died", f"exit code {code}")
        name = signal.Signals(-code).name
        memory = -code == signal.SIGKILL
        return Event(worker, "died", f"killed by {name}", memory=memory)

    def _end(self, worker: int) -> None:
        process, pipe = self._processes.pop(worker, (None, None))
        if process is not None and pipe is not None:
            process.kill()
            process.join()
            pipe.close()

    def close(self) -> None:
        for worker in list(self._processes):
            self._end(worker)


def _serve(pipe: Connection, worker: type[VideoWorker], setup: WorkerSetup, device: str) -> None:
    """Main function of a worker's process; returns when its pipe is closed."""
    # Ctrl-C reaches all processes of a terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    own = worker()
    message = own.start(setup, device)
    pipe.send({"kind": "refused", "message": message} if message else {"kind": "ready"})
    while True:
        try:
            task, staging = pipe.recv()
        except EOFError:
            return
        pipe.send({"kind": "finished", "outcome": own.segment(task, staging)})


def _end_with_parent() -> None:
    """Kill this process when its parent has died."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
