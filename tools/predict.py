#!/usr/bin/env python
"""Write a model's label maps of a whole data set as PNGs, DIR/<video>/<frame>.png. Resumable: run it again.

tools/predict.py --config-file configs/vspw/the_mask_r50_video.yaml --dataset vspw_test --output submission \
    MODEL.WEIGHTS model_final.pth TEST.VIEWS.FLIP True

Test-time keys (TEST.WINDOW, TEST.VIEWS, TEST.ENSEMBLE, ...) work as in evaluations; see docs/test_time.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from the_mask.engine import RunOptions, exit_code, launch
from the_mask.engine.predict import run_prediction


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="YAML", help="model and test-time settings")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="e.g. vspw_test")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the PNGs")
    parser.add_argument(
        "--values",
        choices=("train-ids", "raw"),
        default="train-ids",
        help="0..K-1 (default), or the data set's raw values (VSPW: 1..124)",
    )
    parser.add_argument("--save-scores", metavar="DIR", help="also keep class scores (TEST.SAVE_SCORES), for ensembles")
    parser.add_argument("--num-gpus", type=int, default=0, metavar="N", help="processes, one per GPU")
    parser.add_argument("--num-processes", type=int, default=0, metavar="N", help="processes on the CPU")
    parser.add_argument("--trust-pickle", action="store_true", help="open weights files that can run code (.pkl)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides, at the end")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    overrides = [*args.opts, *(["TEST.SAVE_SCORES", args.save_scores] if args.save_scores else [])]
    options = RunOptions(args.config_file, overrides, trust_pickle=args.trust_pickle)
    return exit_code(
        lambda: launch(
            run_prediction,
            (options, args.dataset, args.output, args.values),
            num_gpus=args.num_gpus,
            num_processes=args.num_processes,
            device=options.load().MODEL.DEVICE,
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
