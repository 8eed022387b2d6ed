"""Threads of the processes of this machine."""

from __future__ import annotations

import os


def threads_per_process(processes: int) -> int:
    """Number of threads for each process on this machine: its cores divided by the processes, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)
