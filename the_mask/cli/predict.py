"""Write a model's label maps of a whole data set as PNGs.

The files are DIR/<video>/<frame>.png. An interrupted run is resumed by running it again.

  the-mask predict --config vspw/the_mask_r50_video --weights model_final.pth \\
      --dataset vspw_test --output submission TEST.VIEWS.FLIP True

Test-time keys (TEST.WINDOW, TEST.VIEWS, TEST.ENSEMBLE, ...) work as in evaluations; see docs/test_time.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from the_mask.cli import _options

EXPECTED = ("ModuleNotFoundError",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    _options.model_or_config(parser)
    _options.data_option(parser)
    _options.weights_option(parser)
    parser.add_argument("--dataset", required=True, metavar="NAME", help="e.g. vspw_test")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the PNGs")
    parser.add_argument(
        "--values",
        choices=("train-ids", "raw"),
        default="train-ids",
        help="0..K-1 (default), or the data set's raw values (VSPW: 1..124)",
    )
    parser.add_argument("--save-scores", metavar="DIR", help="also save class scores (TEST.SAVE_SCORES), for ensembles")
    _options.process_options(parser)
    _options.trust_option(parser)
    _options.overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Predict."""
    from the_mask.engine import RunOptions, launch
    from the_mask.engine.predict import run_prediction

    overrides = [*_options.with_weights(args), *(["TEST.SAVE_SCORES", args.save_scores] if args.save_scores else [])]
    options = RunOptions(
        args.config_file or "", overrides, trust_pickle=args.trust_pickle, model=args.model, data=args.data
    )
    launch(
        run_prediction,
        (options, args.dataset, args.output, args.values),
        num_gpus=args.num_gpus,
        num_processes=args.num_processes,
        device=options.load().MODEL.DEVICE,
    )
