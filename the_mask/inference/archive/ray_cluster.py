"""Workers that are actors of a Ray cluster: one per device, each holding the model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from the_mask.inference.archive.dispatch import Event
from the_mask.inference.archive.manifest import VideoTask
from the_mask.inference.archive.worker import VideoWorker, WorkerSetup

# How Ray says that its memory monitor has ended a worker.
NO_MEMORY = ("OUT_OF_MEMORY", "OutOfMemory", "out of memory", "running low on memory")


class RayWorkers:
    """One actor per worker, spread over the nodes. An actor has one GPU, or its share of the cores.

    Ray's own restarts and retries are off, because an attempt repeated by Ray could run twice.
    """

    def __init__(
        self, setup: WorkerSetup, count: int = 0, device: str = "cpu", worker: type[VideoWorker] = VideoWorker
    ) -> None:
        """Connect to the cluster of ``RAY_ADDRESS``, to one that was started on this machine, or start one here.

        Args:
            setup: of the workers; with ``threads`` 0 each gets as many cores as the nodes have for so many workers.
            count: 0 takes one per GPU of the cluster, or one per node on CPUs.
            device: ``MODEL.DEVICE``.
            worker: class of the actors.

        Raises:
            ModuleNotFoundError: Ray is not installed.
            ConnectionError: no answer under ``RAY_ADDRESS``.
            ValueError: the cluster has no room for so many workers.
        """
        self._ray = ray = _import_ray()
        self._own = not ray.is_initialized()
        if self._own:
            ray.init(logging_level="warning", log_to_driver=False, include_dashboard=False)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._on_gpu = device.startswith("cuda")
        try:
            self.count, cores = room(nodes, count, setup.threads, self._on_gpu)
        except ValueError:
            self.close()
            raise
        self._device = "cuda" if self._on_gpu else device
        self._setup = ray.put(dataclasses.replace(setup, threads=cores))
        options = {"num_cpus": cores, "num_gpus": int(self._on_gpu), "max_restarts": 0, "max_task_retries": 0}
        self._actor: Any = ray.remote(scheduling_strategy="SPREAD", **options)(worker)
        self._actors: dict[int, Any] = {}
        # Awaited reference -> the worker, and whether it is starting.
        self._pending: dict[Any, tuple[int, bool]] = {}

    def start(self, worker: int) -> None:
        self._end(worker)
        actor = self._actors[worker] = self._actor.remote()
        self._pending[actor.start.remote(self._setup, self._device)] = worker, True

    def submit(self, worker: int, task: VideoTask, staging: str) -> None:
        self._pending[self._actors[worker].segment.remote(task, staging)] = worker, False

    def wait(self, seconds: float) -> list[Event]:
        ready, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=seconds) if self._pending else ([], [])
        return [self._event(reference) for reference in ready]

    def _event(self, reference: Any) -> Event:
        worker, starting = self._pending.pop(reference)
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            # Also an actor that cannot be reached: it may live, but is no longer one of ours.
            self._end(worker)
            text = str(error)
            memory = any(word in text for word in NO_MEMORY)
            return Event(worker, "died", " ".join(text.split()), memory=memory)
        if not starting:
            return Event(worker, "finished", outcome=answer)
        return Event(worker, "refused", answer) if answer else Event(worker, "ready")

    def _end(self, worker: int) -> None:
        actor = self._actors.pop(worker, None)
        if actor is not None:
            self._pending = {key: value for key, value in self._pending.items() if value[0] != worker}
            self._ray.kill(actor, no_restart=True)

    def close(self) -> None:
        for worker in list(getattr(self, "_actors", {})):
            self._end(worker)
        if self._own:
            self._ray.shutdown()


def room(nodes: Sequence[dict[str, float]], count: int, threads: int, on_gpu: bool) -> tuple[int, int]:
    """How many workers, and cores for each.

    Args:
        nodes: resources of each, as Ray names them.
        count: wanted; 0: one per GPU, or per node.
        threads: wanted for each; 0: as many as there are for all, at most.
        on_gpu: each needs a GPU.

    Raises:
        ValueError: there is no room for so many.
    """
    cores = [int(node.get("CPU", 0)) for node in nodes]
    gpus = [int(node.get("GPU", 0)) for node in nodes]

    def fit(share: int) -> int:
        by_cores = [n // share for n in cores]
        return sum(map(min, by_cores, gpus) if on_gpu else by_cores)

    wanted = count or (sum(gpus) if on_gpu else sum(n > 0 for n in cores)) or 1
    shares = [threads] if threads else range(max([*cores, 1]), 0, -1)
    for share in shares:
        if fit(share) >= wanted:
            return wanted, share
    least = threads or 1
    what = f"{sum(cores)} cores" + (f" and {sum(gpus)} GPUs" if on_gpu else "")
    raise ValueError(
        f"the Ray cluster has {len(nodes)} nodes with {what}, room for {fit(least)} workers of {least} cores"
        f"{' and a GPU' if on_gpu else ''} each, and {wanted} are asked for (--workers, --threads)"
    )


def _import_ray() -> ModuleType:
    # By default, Ray sends usage statistics to its authors.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('--engine ray needs Ray: pip install "the_mask[ray]"') from error
    return ray
