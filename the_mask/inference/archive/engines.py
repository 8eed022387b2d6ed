"""The kinds of workers, by name."""

from __future__ import annotations

from the_mask.inference.archive.dispatch import Workers
from the_mask.inference.archive.worker import WorkerSetup

ENGINES = ("local", "ray")


def make_workers(engine: str, setup: WorkerSetup, count: int, device: str) -> Workers:
    """Workers of an engine.

    Args:
        engine: one of :data:`ENGINES`.
        setup: of every worker; ``threads`` 0 divides the cores evenly.
        count: 0 takes one per device.
        device: ``MODEL.DEVICE``.

    Raises:
        ValueError: an unknown engine, or more workers than the cluster can hold.
        ModuleNotFoundError: Ray is not installed.
    """
    if engine == "local":
        from the_mask.inference.archive.local import LocalWorkers

        return LocalWorkers(setup, count, device)
    if engine == "ray":
        from the_mask.inference.archive.ray_cluster import RayWorkers

        return RayWorkers(setup, count, device)
    raise ValueError(f"engine {engine!r}: expected one of {', '.join(ENGINES)}")
