"""Measure latency and frame rate of a model's stream.

Measures the model alone, and the whole path from a file to label maps. See docs/streaming.md.

  the-mask benchmark --config camvid/gsvnet_swiftnet_r18 --weights output/model_best.pth \\
      --input drive.mp4 --frames 1000 --output stream.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from the_mask.cli import _options

EXPECTED = ("ModuleNotFoundError",)
OUTPUT_STRIDES = (1, 4, 8)  # copied from the_mask.inference.views, which imports torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    _options.model_or_config(parser)
    _options.weights_option(parser)
    parser.add_argument(
        "--random-weights", action="store_true", help="needs no checkpoint; speed hardly depends on the weights"
    )
    parser.add_argument("--input", metavar="PATH", help="video file or folder; default: a synthetic video of --size")
    parser.add_argument("--size", default="480x853", metavar="HxW", help="of the synthetic video (default: 480x853)")
    parser.add_argument("--frames", type=int, default=1000, metavar="N", help="frames measured (default: 1000)")
    parser.add_argument("--warm-up", type=int, default=50, metavar="N", help="frames before them (default: 50)")
    parser.add_argument("--streams", type=int, default=1, metavar="N", help="streams at once, end to end")
    parser.add_argument("--asynchronous", action="store_true", help="keyframes in a background thread, end to end")
    parser.add_argument("--output-stride", type=int, default=1, choices=OUTPUT_STRIDES)
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch; default: its own choice")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the report with its whole protocol")
    _options.runtime_options(parser)
    _options.trust_option(parser)
    _options.overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Measure, print the table and write the report."""
    import torch

    import the_mask.modeling  # noqa: F401  fills the registries
    from the_mask.data.files import write_json
    from the_mask.engine.logs import setup_logging
    from the_mask.inference import StreamingSegmentor
    from the_mask.inference.benchmark import benchmark, table
    from the_mask.inference.live.sources import open_source
    from the_mask.inference.stream import build_random
    from the_mask.weights.start import start_config

    setup_logging(None)
    size = _options.frame_size(args.size)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads}: expected at least 1")
        torch.set_num_threads(args.threads)
    cfg = start_config(args.config_file or "", _options.with_weights(args), model=args.model)
    model = build_random(cfg) if args.random_weights else None
    segmentor = StreamingSegmentor(cfg, model, trust_pickle=args.trust_pickle, output_stride=args.output_stride)
    input_size: tuple[int, int] | None = size
    if args.input:
        with open_source(args.input) as source:
            input_size = source.size
    runtimes = _options.use_backend(args, segmentor, size=input_size)
    protocol = {
        "config": args.config_file or args.model,
        "overrides": args.opts,
        "weights": "random" if args.random_weights else cfg.MODEL.WEIGHTS,
        "backend": args.backend,
        "precision": args.precision,
    }
    if cfg.MODEL.META_ARCHITECTURE == "PropagatedSegmentor":
        options = cfg.MODEL.KEYFRAME
        protocol |= {"propagator": options.PROPAGATOR, "policy": options.POLICY, "interval": options.INTERVAL}
    report = benchmark(
        segmentor,
        args.input,
        size,
        count=args.frames,
        warm_up=args.warm_up,
        streams=args.streams,
        asynchronous=args.asynchronous,
        protocol=protocol,
    )
    print(table(report))
    if runtimes is not None:
        report["protocol"]["runtimes"] = str(runtimes).splitlines()
        print(runtimes)
    peak = report["memory"]["peak_resident_mib"]
    print(f"memory at most {peak:.0f} MiB; state of a stream {report['model_only']['state_bytes'] / 2**20:.2f} MiB")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, report)
        print(f"report: {args.output}")
