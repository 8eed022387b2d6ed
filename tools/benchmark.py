#!/usr/bin/env python3
"""Measure how fast a segmentor's stream is: latencies and rates, model alone and from file to label map.

Example:
    tools/benchmark.py --config-file configs/camvid/gsvnet_swiftnet_r18.yaml --weights output/model_best.pth \\
        --input drive.mp4 --frames 1000 --output benchmarks/results/stream.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import the_mask.modeling  # noqa: F401  fills the registries
from the_mask.config import load_config
from the_mask.engine import exit_code
from the_mask.engine.logs import setup_logging
from the_mask.inference import StreamingSegmentor
from the_mask.inference.benchmark import benchmark, table
from the_mask.inference.stream import build_random
from the_mask.inference.views import OUTPUT_STRIDES


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="YAML")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint; default: MODEL.WEIGHTS of the config")
    parser.add_argument("--random-weights", action="store_true", help="no checkpoint: speed hardly depends on it")
    parser.add_argument("--input", metavar="PATH", help="video file or folder; default: a moving picture of --size")
    parser.add_argument("--size", default="480x853", metavar="HxW", help="of the moving picture (default: 480x853)")
    parser.add_argument("--frames", type=int, default=1000, metavar="N", help="frames measured (default: 1000)")
    parser.add_argument("--warm-up", type=int, default=50, metavar="N", help="frames before them (default: 50)")
    parser.add_argument("--streams", type=int, default=1, metavar="N", help="streams at once, end to end")
    parser.add_argument("--asynchronous", action="store_true", help="keyframes beside, end to end")
    parser.add_argument("--output-stride", type=int, default=1, choices=OUTPUT_STRIDES)
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch; default: its own choice")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the report with its whole protocol")
    parser.add_argument("--trust-pickle", action="store_true", help="read weights that can execute code")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides, e.g. MODEL.DEVICE cpu")
    return parser


def run(args: argparse.Namespace) -> None:
    """What :func:`main` does, with errors as exceptions."""
    height, _, width = args.size.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"--size {args.size}: expected HEIGHTxWIDTH in pixels, e.g. 480x853")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads}: expected at least 1")
        torch.set_num_threads(args.threads)
    cfg = load_config(args.config_file, [*(["MODEL.WEIGHTS", args.weights] if args.weights else []), *args.opts])
    model = build_random(cfg) if args.random_weights else None
    segmentor = StreamingSegmentor(cfg, model, trust_pickle=args.trust_pickle, output_stride=args.output_stride)
    protocol = {
        "config": args.config_file,
        "overrides": args.opts,
        "weights": "random" if args.random_weights else cfg.MODEL.WEIGHTS,
    }
    if cfg.MODEL.META_ARCHITECTURE == "PropagatedSegmentor":
        options = cfg.MODEL.KEYFRAME
        protocol |= {"propagator": options.PROPAGATOR, "policy": options.POLICY, "interval": options.INTERVAL}
    report = benchmark(
        segmentor,
        args.input,
        (int(height), int(width)),
        count=args.frames,
        warm_up=args.warm_up,
        streams=args.streams,
        asynchronous=args.asynchronous,
        protocol=protocol,
    )
    print(table(report))
    peak = report["memory"]["peak_resident_mib"]
    print(f"memory at most {peak:.0f} MiB; state of a stream {report['model_only']['state_bytes'] / 2**20:.2f} MiB")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"report: {args.output}")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_logging(None)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
