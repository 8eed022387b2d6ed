#!/usr/bin/env python3
"""Export a segmentor as torch.export and ONNX programs: one image, and one step of a stream with explicit state.

Example:
    tools/export.py --config-file configs/camvid/the_mask_r18_video_cpu.yaml --weights output/model_best.pth \\
        --size 360x480 --output exported/
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import the_mask.modeling  # noqa: F401  fills the registries
from the_mask.config import load_config
from the_mask.engine import exit_code
from the_mask.engine.logs import setup_logging
from the_mask.export import EXPORT_FORMATS, export_package
from the_mask.export.package import KINDS
from the_mask.inference import StreamingSegmentor
from the_mask.inference.demo import palette_from_config


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="YAML")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint; default: MODEL.WEIGHTS of the config")
    parser.add_argument("--size", required=True, metavar="HxW", help="source frames, e.g. 480x853")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--formats", nargs="+", default=list(EXPORT_FORMATS), choices=EXPORT_FORMATS)
    parser.add_argument("--labels", action="store_true", help="write label maps at network size instead of scores")
    parser.add_argument("--dynamic", action="store_true", help="let the size of the image program vary")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest relative difference (default: 1e-3)")
    parser.add_argument("--trust-pickle", action="store_true", help="read weights that can execute code")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return parser


def run(args: argparse.Namespace) -> None:
    """What :func:`main` does, with errors as exceptions."""
    height, _, width = args.size.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"--size {args.size}: expected HEIGHTxWIDTH in pixels, at least 1x1, e.g. 480x853")
    overrides = ["MODEL.DEVICE", "cpu", *(["MODEL.WEIGHTS", args.weights] if args.weights else []), *args.opts]
    cfg = load_config(args.config_file, overrides)
    segmentor = StreamingSegmentor(cfg, trust_pickle=args.trust_pickle)
    size = segmentor.network_size(int(height), int(width))
    manifest = export_package(
        segmentor.model,
        args.output,
        size,
        kinds=args.kinds,
        formats=args.formats,
        output="labels" if args.labels else "scores",
        dynamic=args.dynamic,
        classes=list(palette_from_config(cfg).names),
        tolerance=args.tolerance,
    )
    print(f"frames of {args.size} are resized to {size[0]}x{size[1]}")
    for name, program in manifest["programs"].items():
        for file in program["files"].values():
            same = f"{100 * file['same_labels']:.3f} % equal labels"
            print(f"{name}: {args.output / file['file']}, largest difference {file['max_difference']:.1e}, {same}")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_logging(None)
    return exit_code(lambda: run(args), also=(ModuleNotFoundError, RuntimeError))


if __name__ == "__main__":
    raise SystemExit(main())
