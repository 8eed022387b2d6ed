#!/usr/bin/env python
"""Average the weights of checkpoints of one model.

tools/average_checkpoints.py output/run/model_0011999.pth output/run/model_final.pth --output output/run/averaged.pth

Batch norms keep the mean of their running figures, which are not those of the averaged weights: check the result with
tools/train_net.py --eval-only before using it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from the_mask.engine import exit_code
from the_mask.engine.logs import setup_logging
from the_mask.weights.averaging import average_checkpoints


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="PTH", help="two or more weights files")
    parser.add_argument("--output", required=True, type=Path, metavar="PTH", help="file to write")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per checkpoint; default: all equal")
    parser.add_argument("--no-ema", action="store_true", help="take raw weights where a checkpoint also has averages")
    parser.add_argument("--trust-pickle", action="store_true", help="open weights files that can run code (.pkl)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_logging(None)

    def run() -> None:
        content = average_checkpoints(
            args.checkpoints, args.output, args.weights, args.trust_pickle, use_ema=not args.no_ema
        )
        print(f"{args.output}: mean of {len(args.checkpoints)} checkpoints, {len(content['model'])} tensors")

    return exit_code(run)


if __name__ == "__main__":
    raise SystemExit(main())
