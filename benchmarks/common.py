"""Shared by the benchmarks: description of the machine, its bandwidth and arithmetic, peak memory, JSON."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timing import race

from the_mask.inference.benchmark import machine as library_machine

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """The library's description of the machine, and facts that affect kernels: vector units, caches, memory."""
    facts = library_machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        fields = (line.partition(":") for line in information.read_text().splitlines())
        known = {name.strip(): value.strip() for name, _, value in fields}
        flags = known.get("flags", "").split()
        facts["flags"] = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
        for level in ("1", "2", "3"):
            size = Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size")
            if size.exists():
                facts[f"cache_index{level}"] = size.read_text().strip()
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    return facts


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean."""
    return statistics.geometric_mean(values)


def bandwidth(threads: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes per second that a copy of 256 MB reads and writes."""
    source = torch.ones(1 << 25, dtype=torch.float64)
    target = torch.empty_like(source)
    with_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        times = race({"copy": lambda: target.copy_(source)}, 7, torch.device("cpu"), clock=clock)["copy"]
    finally:
        torch.set_num_threads(with_threads)
    return 2 * source.numel() * source.element_size() / statistics.median(times)


def multiply_adds(threads: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Float32 multiply-adds per second that the machine's matrix product reaches."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    with_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        times = race({"product": lambda: a @ b}, 7, torch.device("cpu"), clock=clock)["product"]
    finally:
        torch.set_num_threads(with_threads)
    return 1024**3 / statistics.median(times)


def peak_memory(function: Callable[[], object]) -> int:
    """Peak growth of the process in bytes while ``function`` runs; its result is kept until the end.

    Linux only. Run it in a new process with ``MALLOC_MMAP_THRESHOLD_=65536``, which returns freed memory to the system
    at once; otherwise memory of an earlier call is reused.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = function()
    peak = _status("VmHWM")
    del result
    return peak - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def write_json(name: str, report: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a report below ``benchmarks/results``; returns where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path
