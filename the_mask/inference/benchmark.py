"""Measures the speed of streams: the model alone, each stage of a video's path, and from file to label map.

Latency matters, not only the rate: a system is as smooth as its slowest frames. So the 50th, 90th and 99th percentile
and the maximum are reported, together with the protocol of the measurement.
"""

from __future__ import annotations

import os
import platform
import resource
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

import the_mask
from the_mask.inference.live.many_streams import StreamEngine
from the_mask.inference.live.sources import Frame, FrameSource, open_source
from the_mask.inference.rendering.video_writer import VideoWriter
from the_mask.inference.stage_clocks import stage_seconds
from the_mask.inference.stream import StreamingSegmentor

PERCENTILES = (50, 90, 99)
# Stages are timed on at most this many frames.
STAGE_FRAMES = 200
# Number of frames of the synthetic video.
SYNTHETIC_FRAMES = 120


def latencies(seconds: Sequence[float]) -> dict[str, float]:
    """Statistics of latencies: milliseconds, and the frame rate that corresponds to their mean.

    A percentile is a measured value: the smallest one that at least that share of the values does not exceed.
    """
    if not seconds:
        return {"frames": 0}
    values = np.sort(np.asarray(seconds, dtype=np.float64))
    table = {f"p{p}_ms": 1e3 * float(np.percentile(values, p, method="inverted_cdf")) for p in PERCENTILES}
    mean = float(values.mean())
    return {
        "frames": len(values),
        "mean_ms": 1e3 * mean,
        **table,
        "max_ms": 1e3 * float(values[-1]),
        "frames_per_second": 1 / mean,
    }


def by_kind(seconds: Sequence[float], keyframes: Sequence[bool | None]) -> dict[str, dict[str, float]]:
    """:func:`latencies` of all frames, and separately of keyframes and other frames if the model has keyframes."""
    table = {"all": latencies(seconds)}
    if any(key is not None for key in keyframes):
        table["key"] = latencies([s for s, key in zip(seconds, keyframes, strict=True) if key])
        table["non_key"] = latencies([s for s, key in zip(seconds, keyframes, strict=True) if not key])
    return table


def measure_model(segmentor: StreamingSegmentor, frames: Sequence[Frame], count: int, warm_up: int) -> dict[str, Any]:
    """Time a model's steps alone, on prepared frames, keyframes and others apart.

    Args:
        segmentor: the segmentor to measure.
        frames: frames to use in turn.
        count: number of frames to measure.
        warm_up: number of frames before that, not measured.

    Returns:
        ``model`` as :func:`by_kind`, and ``state_bytes``.
    """
    device = segmentor.model.device
    prepared = [segmentor.prepare(frame) for frame in frames]
    state: Any = segmentor.model.init_state()
    times: list[float] = []
    keys: list[bool | None] = []
    for number in range(warm_up + count):
        start = _now(device)
        _, state = segmentor.model.step(prepared[number % len(prepared)], state)
        if number >= warm_up:
            times.append(_now(device) - start)
            keys.append(segmentor.model.is_keyframe(state))
    return {"model": by_kind(times, keys), "state_bytes": state_bytes(state)}


def measure_stages(
    segmentor: StreamingSegmentor, source: str | Path, folder: str | Path, count: int, warm_up: int
) -> dict[str, dict[str, float]]:
    """Latencies of every stage from a file to an annotated file, and of all together ("frame").

    Args: see :func:`the_mask.inference.stage_clocks.stage_seconds`.

    Returns:
        :func:`latencies` by stage, by the wall clock, with ``processor_ms``: the mean of the process on all cores.
    """
    clocks = stage_seconds(segmentor, source, folder, count, warm_up)
    for table in clocks:
        table["frame"] = [sum(spent) for spent in zip(*table.values(), strict=True)]
    wall, processor = clocks
    return {
        stage: {**latencies(spent), "processor_ms": 1e3 * float(np.mean(processor[stage]))}
        for stage, spent in wall.items()
    }


def measure_stream(
    segmentor: StreamingSegmentor,
    source: str | Path,
    count: int,
    warm_up: int,
    streams: int = 1,
    asynchronous: bool = False,
) -> dict[str, Any]:
    """Time everything from the file to label maps, through the engine; nothing is drawn or written.

    The file is repeated as one endless stream with increasing timestamps.

    Args:
        segmentor: the segmentor to measure.
        source: video file or folder.
        count: number of frames to measure, of all streams together.
        warm_up: number of frames before that, not measured.
        streams: number of streams; the file is opened this many times.
        asynchronous: see :class:`StreamEngine`.

    Returns:
        ``interval``: time from one finished frame (of any stream) to the next as :func:`by_kind`; ``latency``: time
        from decoded to finished, including waiting in the queue; ``frames_per_second`` of all streams; ``dropped``.
    """
    device = segmentor.model.device
    intervals: list[float] = []
    waits: list[float] = []
    keys: list[bool | None] = []
    with StreamEngine(segmentor, asynchronous=asynchronous) as engine:
        for number in range(streams):
            engine.add(lambda _: _endless(source), f"stream {number}", mode="all")
        seen, start, last = 0, 0.0, 0.0
        while len(waits) < count:
            results = engine.tick()
            now = _now(device)
            for result in results:
                seen += 1
                if seen > warm_up and last:
                    # The frames of a batch are finished together and share its time.
                    intervals.append((now - last) / len(results))
                    waits.append(result.latency)
                    keys.append(result.keyframe)
            last = now
            if seen <= warm_up:
                start = now
        elapsed = last - start
        dropped = sum(report.dropped for report in engine.reports.values())
    return {
        "interval": by_kind(intervals, keys),
        "latency": by_kind(waits, keys),
        "frames_per_second": len(waits) / elapsed,
        "dropped": dropped,
    }


def benchmark(
    segmentor: StreamingSegmentor,
    source: str | Path | None = None,
    size: tuple[int, int] = (480, 853),
    *,
    count: int = 1000,
    warm_up: int = 50,
    streams: int = 1,
    asynchronous: bool = False,
    protocol: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the whole benchmark; see :func:`measure_model`, :func:`measure_stages` and :func:`measure_stream`.

    Args:
        segmentor: the segmentor to measure.
        source: video file or folder; None makes a synthetic video of ``size`` (height, width).
        count, warm_up, streams, asynchronous: see there.
        protocol: further entries for the result (config, weights, ...).

    Raises:
        ValueError: numbers below 1, or a source that cannot be read.
    """
    if min(count, streams) < 1 or warm_up < 0:
        raise ValueError(f"{count} frames, {streams} streams, {warm_up} to warm up: expected at least 1, 1 and 0")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(source) if source is not None else _moving_picture(Path(folder) / "moving.mp4", size)
        with open_source(path) as opened:
            frames = [frame for frame, _ in zip(opened, range(64))]
        height, width = frames[0].shape[:2]
        model = segmentor.model
        report: dict[str, Any] = {
            "machine": machine(),
            "protocol": {
                **(protocol or {}),
                "model": type(model).__name__,
                "parameters": sum(p.numel() for p in model.parameters()),
                "device": str(model.device),
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "source": str(source) if source is not None else "synthetic moving picture, H.264 or MPEG-4",
                "frame_size": [height, width],
                "network_size": list(segmentor.network_size(height, width)),
                "output": segmentor.output,
                "output_stride": segmentor.output_stride,
                "frames": count,
                "warm_up_frames": warm_up,
                "streams": streams,
                "asynchronous_keyframes": asynchronous,
                "percentiles": "smallest value that at least p % of the frames do not exceed",
            },
        }
        report["model_only"] = measure_model(segmentor, frames, count, warm_up)
        stage_frames = min(count, STAGE_FRAMES)
        report["stages"] = measure_stages(segmentor, path, folder, stage_frames, min(warm_up, stage_frames))
        report["end_to_end"] = measure_stream(segmentor, path, count, warm_up, streams, asynchronous)
    report["memory"] = memory(model.device)
    if hasattr(os, "getloadavg"):
        report["machine"]["load_average_at_end"] = os.getloadavg()
    return report


def table(report: Mapping[str, Any]) -> str:
    """A report's latencies as a text table."""
    lines = [f"{'':28}{'frames':>7}{'fps':>9}" + "".join(f"{f'p{p} ms':>10}" for p in PERCENTILES) + f"{'max ms':>10}"]
    for part, name in (("model_only", "model"), ("end_to_end", "interval"), ("end_to_end", "latency")):
        for kind, row in report[part][name].items():
            if not row["frames"]:
                continue
            label = {"model": "model only", "interval": "end to end", "latency": "decoded to label map"}[name]
            # The inverse of a latency is not a frame rate.
            rate = f"{row['frames_per_second']:9.2f}" if name != "latency" else f"{'':9}"
            values = "".join(f"{row[f'p{p}_ms']:10.2f}" for p in PERCENTILES)
            lines.append(f"{label + ', ' + kind:28}{row['frames']:7}{rate}{values}{row['max_ms']:10.2f}")
    for stage, row in report["stages"].items():
        values = "".join(f"{row[f'p{p}_ms']:10.2f}" for p in PERCENTILES)
        lines.append(f"{'stage ' + stage:28}{row['frames']:7}{'':9}{values}{row['max_ms']:10.2f}")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Processor, memory, versions and load."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "logical_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "av": av.__version__,
        "the_mask": the_mask.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    information = Path("/proc/cpuinfo")
    if information.exists():
        named = (line.partition(":") for line in information.read_text().splitlines())
        facts["processor"] = {k.strip(): v.strip() for k, _, v in named}.get("model name", facts["processor"])
    if hasattr(os, "getloadavg"):
        facts["load_average_at_start"] = os.getloadavg()
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def memory(device: torch.device) -> dict[str, float]:
    """Peak memory of the process and, for a GPU, of the device, in MiB."""
    # Kilobytes on Linux, bytes on macOS.
    unit = 1024 if platform.system() == "Linux" else 1
    found = {"peak_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
    if device.type == "cuda":
        found["peak_device_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found


def state_bytes(state: Any) -> int:
    """Bytes of the tensors in a state."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    children = state.values() if isinstance(state, Mapping) else state if isinstance(state, (list, tuple)) else ()
    return sum(state_bytes(child) for child in children)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _endless(source: str | Path) -> FrameSource:
    first = open_source(source)

    def frames() -> Iterator[Frame]:
        opened = first
        while True:
            with opened:
                yield from opened
            opened = open_source(source)

    return FrameSource(str(source), frames(), first.fps, None, first.close)


def _moving_picture(path: Path, size: tuple[int, int]) -> Path:
    """Write a synthetic video: smooth colours, an edge and some noise, moving by two pixels per frame."""
    height, width = size
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, : width + 2 * SYNTHETIC_FRAMES]
    wide = np.stack([np.sin(x / 31 + y / 47), np.cos(y / 29 - x / 53), np.sin(x * y / 9e3)], axis=-1)
    wide = 120 + 90 * wide + rng.normal(0, 6, wide.shape)
    wide[height // 3 : height // 2] += 40
    wide = wide.clip(0, 255).astype(np.uint8)
    with VideoWriter(path, Fraction(25)) as writer:
        for number in range(SYNTHETIC_FRAMES):
            writer.write(np.ascontiguousarray(wide[:, 2 * number : 2 * number + width]))
    return path
