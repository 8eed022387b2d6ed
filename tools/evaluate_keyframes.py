#!/usr/bin/env python
"""Accuracy by distance from the keyframe, and operations per frame, of a propagated model.

tools/evaluate_keyframes.py --config-file configs/moving_shapes/gsvnet_swiftnet_r18.yaml --distances 5 \\
    MODEL.WEIGHTS output/gsvnet/model_final.pth
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from the_mask.engine import RunOptions, exit_code
from the_mask.engine.keyframes import run_keyframe_evaluation


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="YAML", help="of META_ARCHITECTURE PropagatedSegmentor")
    parser.add_argument("--distances", type=int, default=5, metavar="L", help="0 ... L-1 frames from the keyframe")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--trust-pickle", action="store_true", help="open weights files that can run code (.pkl)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides, at the end")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and return the exit code."""
    args = build_parser().parse_args(arguments)
    options = RunOptions(
        config_file=args.config_file, overrides=args.opts, eval_only=True, trust_pickle=args.trust_pickle
    )
    return exit_code(lambda: run_keyframe_evaluation(options, args.distances, args.json))


if __name__ == "__main__":
    sys.exit(main())
