"""Train a temporal model in its two stages and evaluate each.

  the-mask train-two-stage --stage1 vspw/the_mask_mit_b1_1f --stage2 vspw/the_mask_mit_b1_video --output output/mit_b1

Stage 1 writes to OUTPUT/one_frame; stage 2 starts from its weights and writes to OUTPUT/temporal; the figures of both
are in OUTPUT/summary.json. Runs in one process; for several GPUs run `the-mask train` twice, the second time with
MODEL.WEIGHTS OUTPUT/one_frame/model_final.pth.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from the_mask.cli import _options

FIGURES = ("mIoU", "fwIoU", "pACC", "VC8", "VC16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--stage1", required=True, metavar="YAML", help="the one-frame model")
    parser.add_argument("--stage2", required=True, metavar="YAML", help="the temporal model")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--weights", default="", metavar="FILE", help="initial weights of stage 1")
    parser.add_argument("--resume", action="store_true", help="continue; finished trainings are kept")
    parser.add_argument(
        "--branches", action="store_true", help="also evaluate the clip and the frame branch separately"
    )
    _options.overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Train, evaluate, write ``summary.json``, print the table."""
    from tabulate import tabulate

    from the_mask.data.files import write_json
    from the_mask.engine import evaluate_branches, train_two_stage

    results, configs = train_two_stage(
        (args.stage1, args.stage2), args.output, args.opts, weights=args.weights, resume=args.resume
    )
    if args.branches:
        results |= evaluate_branches(configs[-1])
    summary = {name: {k: None if math.isnan(v) else v for k, v in figures.items()} for name, figures in results.items()}
    write_json(args.output / "summary.json", summary)
    rows = [[name, *(figures.get(f, math.nan) for f in FIGURES)] for name, figures in results.items()]
    print(tabulate(rows, ["model", *FIGURES], floatfmt=".2f"))
