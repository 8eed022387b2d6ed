"""Evaluate a propagated model by distance from the keyframe.

Also counts its operations per frame.

  the-mask evaluate-keyframes --config moving_shapes/gsvnet_swiftnet_r18 --distances 5 \\
      MODEL.WEIGHTS output/gsvnet/model_final.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path

from the_mask.cli import _options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    _options.config_option(parser, help="of META_ARCHITECTURE PropagatedSegmentor, by path or name")
    parser.add_argument("--distances", type=int, default=5, metavar="L", help="0 ... L-1 frames from the keyframe")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    _options.trust_option(parser)
    _options.overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluate."""
    from the_mask.engine import RunOptions
    from the_mask.engine.keyframes import run_keyframe_evaluation

    options = RunOptions(args.config_file, args.opts, eval_only=True, trust_pickle=args.trust_pickle)
    run_keyframe_evaluation(options, args.distances, args.json)
