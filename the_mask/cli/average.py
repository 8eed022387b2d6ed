"""Average the weights of checkpoints of one model.

  the-mask average output/run/model_0011999.pth output/run/model_final.pth --output output/run/averaged.pth

The running statistics of batch norms are averaged too, but they do not match the averaged weights exactly: evaluate the
result before using it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from the_mask.cli import _options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="PTH", help="two or more weights files")
    parser.add_argument("--output", required=True, type=Path, metavar="PTH", help="file to write")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per checkpoint; default: all equal")
    parser.add_argument("--no-ema", action="store_true", help="take raw weights where a checkpoint also has averages")
    _options.trust_option(parser)


def run(args: argparse.Namespace) -> None:
    """Average and write."""
    from the_mask.engine.logs import setup_logging
    from the_mask.weights.averaging import average_checkpoints

    setup_logging(None)
    content = average_checkpoints(
        args.checkpoints, args.output, args.weights, args.trust_pickle, use_ema=not args.no_ema
    )
    print(f"{args.output}: mean of {len(args.checkpoints)} checkpoints, {len(content['model'])} tensors")
