"""Interleaved timing, for benchmarks that may have nothing but torch.

Contenders alternate in every round, so that the load of the machine affects all of them; a ratio is the median of the
rounds' ratios.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Row = dict[str, float]


def quartiles(values: Sequence[float]) -> Row:
    """Median and interquartile range of seconds, in milliseconds, and how many there were."""
    ordered = sorted(values)
    if len(ordered) < 4:
        spread = ordered[-1] - ordered[0]
    else:
        first, _, third = statistics.quantiles(ordered, n=4)
        spread = third - first
    return {"median_ms": 1e3 * statistics.median(ordered), "iqr_ms": 1e3 * spread, "runs": len(ordered)}


def synchronise(device: torch.device) -> None:
    """Wait for the device before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def race(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    seconds_per_turn: float = 0.1,
    most_per_turn: int = 20,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time contenders alternately; one number per round for each: the mean of as many calls as fit into its turn.

    Use ``time.process_time`` as ``clock`` for one thread on a busy machine.
    """
    calls: dict[str, int] = {}
    for name, function in contenders.items():
        function()
        synchronise(device)
        start = clock()
        function()
        synchronise(device)
        once = clock() - start
        calls[name] = max(1, min(most_per_turn, int(seconds_per_turn / max(once, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in contenders.items():
                start = clock()
                for _ in range(calls[name]):
                    function()
                synchronise(device)
                times[name].append((clock() - start) / calls[name])
    finally:
        gc.enable()
    return times


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times faster, as the median over rounds."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))
