#!/usr/bin/env python
"""A complete study of keyframe propagation: key segmentor, propagators, accuracy, operations, frames per second.

benchmarks/keyframe_study.py --key configs/moving_shapes/swiftnet_r18.yaml \\
    --propagated configs/moving_shapes/gsvnet_swiftnet_r18.yaml --output output/keyframes

Trains the key segmentor (or takes --key-weights), then each propagator on top of it, and evaluates each labelled frame
at distances 0 ... 4 from a keyframe. Speed is measured in rounds over all models and intervals, so that a change of the
machine's load affects all of them; the median round is reported. Results that exist in --output are not computed again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import machine
from tabulate import tabulate

from the_mask.data import get_records
from the_mask.data.io import read_image
from the_mask.engine import RunOptions, exit_code
from the_mask.engine.keyframes import run_keyframe_evaluation
from the_mask.engine.run import run_training
from the_mask.inference import StreamingSegmentor
from the_mask.modeling.propagation.policies import Gate
from the_mask.modeling.propagation.propagated import PropagatedSegmentor
from the_mask.weights import trained

# Overrides by name in the table. Copying needs no training.
PROPAGATORS: dict[str, list[Any]] = {
    "copy": ["MODEL.KEYFRAME.PROPAGATOR", "copy"],
    "warp": ["MODEL.KEYFRAME.PROPAGATOR", "warp"],
    "gsvnet without intra": ["MODEL.KEYFRAME.INTRA", "False"],
    "gsvnet": [],
}
FRAMES = 20


def trained_weights(config: Path, folder: Path, overrides: Sequence[Any]) -> Path:
    """Final weights of the training in ``folder``, which is started or continued unless it is finished."""
    final = folder / "model_final.pth"
    if not final.is_file():
        words = [*overrides, "OUTPUT_DIR", folder, "TEST.EVAL_PERIOD", -1]
        run_training(RunOptions(config, [str(word) for word in words], resume=(folder / "last_checkpoint").is_file()))
    return final


def evaluated(config: Path, folder: Path, overrides: Sequence[Any], distances: int) -> dict[str, Any]:
    """Figures by distance of a propagated model, kept in ``folder``."""
    file = folder / "figures.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        words = [str(word) for word in (*overrides, "OUTPUT_DIR", folder)]
        run_keyframe_evaluation(RunOptions(config, words, eval_only=True), distances, file)
    return next(iter(json.loads(file.read_text()).values()))


def speeds(runs: dict[str, tuple[Path, list[Any]]], distances: int, rounds: int) -> dict[str, dict[str, float]]:
    """Frames per second from frames in memory to label maps, by model and interval; "alone": the segmentor's own."""
    streams: dict[str, tuple[StreamingSegmentor, Any]] = {}
    images: list[Any] = []
    for name, (config, overrides) in runs.items():
        cfg = RunOptions(config, [str(word) for word in overrides]).load()
        model = trained(cfg)
        if not images:
            record = get_records(cfg.DATASETS.TEST[0])[0]
            images = [read_image(frame["file_name"]) for frame in record["frames"][:FRAMES]]
            assert isinstance(model, PropagatedSegmentor)
            streams["alone"] = StreamingSegmentor(cfg, model=model.segmentor), None
        streams[name] = StreamingSegmentor(cfg, model=model), model
    times: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds + 1):
        for name, (stream, model) in streams.items():
            for interval in [1] if model is None else range(1, distances + 1):
                if model is not None:
                    model.gate = Gate(float("inf"), max_gap=interval)
                state = stream.init_state()
                start = time.perf_counter()
                for t in range(FRAMES):
                    _, state = stream.step(images[t % len(images)], state)
                # The first round warms up.
                if number:
                    seconds = time.perf_counter() - start
                    times.setdefault(name, {}).setdefault(str(interval), []).append(FRAMES / seconds)
    return {name: {key: median(values) for key, values in rows.items()} for name, rows in times.items()}


def study(args: argparse.Namespace) -> None:
    """Run all steps; write ``study.json`` and print the table."""
    folder: Path = args.output
    key_overrides = ["SOLVER.MAX_ITER", args.key_iterations] if args.key_iterations else []
    key = args.key_weights or trained_weights(args.key, folder / "key", [*key_overrides, *args.opts])
    iterations = ["SOLVER.MAX_ITER", args.iterations] if args.iterations else []
    runs: dict[str, tuple[Path, list[Any]]] = {}
    figures = {}
    for name, own in PROPAGATORS.items():
        place = folder / name.replace(" ", "_")
        overrides = [*own, *iterations, *args.opts]
        weights = key if name == "copy" else trained_weights(args.propagated, place, [*overrides, "MODEL.WEIGHTS", key])
        overrides += ["MODEL.WEIGHTS", weights]
        runs[name] = args.propagated, overrides
        figures[name] = evaluated(args.propagated, place / "evaluation", overrides, args.distances)
    fps = speeds(runs, args.distances, args.rounds)
    rows = []
    for name, result in figures.items():
        for row in result["intervals"]:
            speed = fps[name][str(row["interval"])]
            rows.append({"propagator": name, **row, "fps": speed, "speed-up": speed / fps["alone"]["1"]})
    report = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "segmentor": figures["copy"]["mIoU_segmentor"],
        "fps_alone": fps["alone"]["1"],
    }
    (folder / "study.json").write_text(json.dumps({**report, "rows": rows, "figures": figures}, indent=2) + "\n")
    print(f"segmentor alone: {report['segmentor']:.2f} mIoU, {report['fps_alone']:.1f} frames per second")
    print(tabulate(rows, headers="keys", floatfmt=".2f"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--key", type=Path, required=True, metavar="YAML", help="of the key segmentor")
    parser.add_argument("--propagated", type=Path, required=True, metavar="YAML", help="of GSVNet on top of it")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--key-weights", type=Path, metavar="FILE", help="take a trained key segmentor")
    parser.add_argument("--key-iterations", type=int, metavar="N", help="instead of the config's SOLVER.MAX_ITER")
    parser.add_argument("--iterations", type=int, metavar="N", help="of each propagator, instead of the config's")
    parser.add_argument("--distances", type=int, default=5, metavar="L")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="of the speed measurement")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides of all runs")
    args = parser.parse_args(arguments)
    return exit_code(lambda: study(args))


if __name__ == "__main__":
    sys.exit(main())
