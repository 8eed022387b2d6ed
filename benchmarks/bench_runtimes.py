#!/usr/bin/env python3
"""Speed of the networks of a stream in every runtime that is installed, with label maps compared.

Random weights (speed hardly depends on them), one frame after the other, all backends alternate in every round, medians
over the rounds. "plain" is the model in PyTorch without any preparation.

    benchmarks/bench_runtimes.py --threads 2 --output benchmarks/results/runtimes.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from common import machine
from tabulate import tabulate

import the_mask.modeling  # noqa: F401  fills the registries
from the_mask.config import load_config
from the_mask.engine import exit_code
from the_mask.inference import StreamingSegmentor
from the_mask.inference.runtimes import use_runtime
from the_mask.inference.runtimes.sessions import missing
from the_mask.inference.stream import build_random

CONFIGS = (
    "camvid/street_live_frame",
    "camvid/swiftnet_r18",
    "moving_shapes/gsvnet_swiftnet_r18",
    "vspw/mask2former_r50",
)
BACKENDS = ("eager", "onnxruntime", "openvino", "auto")


def measure(config: str, size: tuple[int, int], backends: list[str], rounds: int, frames: int) -> dict[str, Any]:
    """Milliseconds per frame and share of pixels that keep their label, by backend."""
    torch.manual_seed(0)
    model: Any = build_random(load_config(config, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]))
    models = {"plain": model} | {name: copy.deepcopy(model) for name in backends}
    reports = {name: use_runtime(models[name], name) for name in backends}
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (frames, 12, 20, 3), dtype=np.uint8)
    video = [np.kron(frame, np.ones((size[0] // 12 + 1, size[1] // 20 + 1, 1), np.uint8)) for frame in small]
    video = [np.ascontiguousarray(frame[: size[0], : size[1]]) for frame in video]
    streams = {}
    for name, own in models.items():
        streams[name] = StreamingSegmentor(own)
        streams[name].box = (max(size), min(size))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    labels: dict[str, list[torch.Tensor]] = {}
    for number in range(rounds + 1):
        for name, stream in streams.items():
            state, results, times = stream.init_state(), [], []
            for frame in video:
                start = time.perf_counter()
                result, state = stream.step(frame, state)
                times.append(time.perf_counter() - start)
                results.append(result)
            labels[name] = results
            if number:  # the first round makes the sessions
                seconds[name].append(sum(times) / len(times))
    same = {
        name: min(float((a == b).float().mean()) for a, b in zip(labels[name], labels["plain"], strict=True))
        for name in models
    }
    return {
        "ms_per_frame": {name: round(1e3 * statistics.median(values), 2) for name, values in seconds.items()},
        "same_labels": same,
        "auto": str(reports["auto"]).splitlines() if "auto" in reports else [],
    }


def run(args: argparse.Namespace) -> None:
    """Measure every config, print a table, write JSON."""
    torch.set_num_threads(args.threads)
    height, width = map(int, args.size.split("x"))
    backends = [name for name in args.backends if not missing(name)]
    results = {}
    for config in args.configs:
        results[config] = measure(config, (height, width), backends, args.rounds, args.frames)
        print(config, results[config], flush=True)
    names = ["plain", *backends]
    rows = [
        [config, *(r["ms_per_frame"][name] for name in names), min(r["same_labels"].values())]
        for config, r in results.items()
    ]
    print(tabulate(rows, ["milliseconds per frame", *names, "same labels"], tablefmt="github"))
    report = {
        "machine": machine(),
        "threads": args.threads,
        "size": args.size,
        "rounds": args.rounds,
        "results": results,
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, metavar="CONFIG")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=(*BACKENDS, "compile"))
    parser.add_argument("--size", default="480x864", metavar="HxW")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=4, help="a round: one keyframe and three others")
    parser.add_argument("--output", type=Path, metavar="JSON")
    args = parser.parse_args()
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
