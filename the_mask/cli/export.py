"""Export a model as torch.export and ONNX programs.

Programs of two kinds: one image, and one step of a stream with explicit state. See docs/export.md.

  the-mask export --model street-live --size 720x1280 --output exported/
  the-mask export --config camvid/the_mask_r18_video_cpu --weights model_best.pth --size 360x480 --output exported/
"""

from __future__ import annotations

import argparse
from pathlib import Path

from the_mask.cli import _model, _options

EXPECTED = ("ModuleNotFoundError", "RuntimeError")
# Copied from the_mask.export.package, which imports torch.
KINDS, FORMATS = ("image", "stream"), ("torch", "onnx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    _options.model_or_config(parser)
    _options.weights_option(parser)
    parser.add_argument("--size", required=True, metavar="HxW", help="source frames, e.g. 480x853")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--labels", action="store_true", help="write label maps at network size instead of scores")
    parser.add_argument("--dynamic", action="store_true", help="allow dynamic sizes in the image program")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest relative difference (default: 1e-3)")
    _options.trust_option(parser)
    _options.overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Export, compare with PyTorch, and print the files."""
    import the_mask.modeling  # noqa: F401  fills the registries
    from the_mask.engine.logs import setup_logging
    from the_mask.export import export_package
    from the_mask.inference import StreamingSegmentor

    setup_logging(None)
    frame = _options.frame_size(args.size)
    args.opts = ["MODEL.DEVICE", "cpu", *args.opts]
    cfg, palette = _model.model_and_palette(args)
    segmentor = StreamingSegmentor(cfg, trust_pickle=args.trust_pickle)
    size = segmentor.network_size(*frame)
    manifest = export_package(
        segmentor.model,
        args.output,
        size,
        kinds=args.kinds,
        formats=args.formats,
        output="labels" if args.labels else "scores",
        dynamic=args.dynamic,
        classes=list(palette.names),
        tolerance=args.tolerance,
    )
    print(f"frames of {args.size} are resized to {size[0]}x{size[1]}")
    for name, program in manifest["programs"].items():
        for file in program["files"].values():
            same = f"{100 * file['same_labels']:.3f} % equal labels"
            print(f"{name}: {args.output / file['file']}, largest difference {file['max_difference']:.1e}, {same}")
