#!/usr/bin/env python3
"""Segment a video file, a folder of frames or a camera, and write the annotated video.

Examples:
    tools/demo.py --model street-live --input drive.mp4 --output out.mp4
    tools/demo.py --config-file configs/camvid/mask2former_r18_cpu.yaml --weights output/model_best.pth \\
        --input drive.mp4 --output out.mp4 --contact-sheet out.png
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import the_mask.modeling  # noqa: F401  fills the registries
from the_mask.cli import _options
from the_mask.config import load_config
from the_mask.engine import exit_code
from the_mask.engine.logs import setup_logging
from the_mask.engine.memory import keep_freed_memory
from the_mask.engine.signals import interrupted_by_signals
from the_mask.inference import StreamingSegmentor
from the_mask.inference.demo import AUDIO, DemoStyle, check_outputs, palette_from_config, run_demo
from the_mask.inference.rendering.video_writer import VideoWriter, open_source
from the_mask.models import model_config, model_names

logger = logging.getLogger("the_mask.demo")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="NAME", help=f"comes with the library: {', '.join(model_names())}")
    model.add_argument("--config-file", metavar="YAML")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint; default: MODEL.WEIGHTS of the config")
    parser.add_argument(
        "--input", required=True, help="video, animation or picture, folder of frames, URL, or camera index (0, 1, ...)"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="VIDEO", help=".mp4, .mkv, .mov or .avi")
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG", help="a picture of about a dozen frames")
    parser.add_argument("--alpha", type=float, default=0.55, help="0: frame only, 1: colours only (default: 0.55)")
    parser.add_argument("--no-legend", action="store_true")
    parser.add_argument("--show-input", action="store_true", help="the untouched frame beside the segmentation")
    parser.add_argument("--dataset", default="", metavar="NAME", help="class names and colours; default: the config's")
    parser.add_argument("--fps", type=float, help="frames per second; default: those of the input, 15 for a folder")
    parser.add_argument("--audio", choices=AUDIO, default="copy", help="sound of the input (default: copy)")
    parser.add_argument("--max-frames", type=int, default=0, metavar="N", help="stop after N frames (0: all)")
    parser.add_argument("--asynchronous", action="store_true", help="keyframe models: compute keyframes beside")
    _options.runtime_options(parser)
    parser.add_argument("--trust-pickle", action="store_true", help="read weights that can execute code")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides, e.g. MODEL.DEVICE cpu")
    return parser


def run(args: argparse.Namespace) -> None:
    """What :func:`main` does, with errors as exceptions."""
    overrides = [*(["MODEL.WEIGHTS", args.weights] if args.weights else []), *args.opts]
    cfg = model_config(args.model, overrides) if args.model else load_config(args.config_file, overrides)
    style = DemoStyle(alpha=args.alpha, legend=not args.no_legend, show_input=args.show_input)
    if not 0 <= style.alpha <= 1:
        raise ValueError(f"--alpha {style.alpha}: expected 0 (frame only) to 1 (colours only)")
    palette = palette_from_config(cfg, args.dataset)
    if args.dataset:
        cfg.DATASETS.TEST = (args.dataset,)  # whose classes the weights are checked against
    VideoWriter(args.output)  # a bad name should be found before the model is built
    with interrupted_by_signals(), open_source(args.input, args.fps, on_problem=logger.warning) as source:
        check_outputs(source, palette, args.output, args.contact_sheet, style)
        segmentor = StreamingSegmentor(cfg, trust_pickle=args.trust_pickle)
        runtimes = _options.use_backend(args, segmentor.model)
        report = run_demo(
            segmentor,
            source,
            palette,
            args.output,
            contact_sheet=args.contact_sheet,
            style=style,
            max_frames=args.max_frames,
            asynchronous=args.asynchronous,
            audio=args.audio,
        )
    speed = report.frames / report.seconds if report.seconds else 0.0
    stopped = ", stopped by a signal" if report.interrupted else ""
    keys = f", {report.keyframes} of them keyframes," if report.keyframes else ""
    print(f"{report.frames} frames{keys} in {report.seconds:.1f} s ({speed:.1f} frames/s){stopped}: {args.output}")
    if runtimes is not None:
        print(runtimes)
    if args.contact_sheet:
        print(f"contact sheet: {args.contact_sheet}")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_logging(None)
    keep_freed_memory()
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
