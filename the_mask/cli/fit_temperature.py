"""Fit the temperature of a model's scores.

For TEST.ENSEMBLE.NORMALIZE or TEST.VIEWS.NORMALIZE "temperature".

  the-mask fit-temperature --config camvid/mask2former_r18_cpu --dataset camvid_train MODEL.WEIGHTS model_final.pth

Fit it on frames on which the ensemble is not evaluated. Frames that the model was trained on give a temperature that is
too low.
"""

from __future__ import annotations

import argparse

from the_mask.cli import _options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    _options.config_option(parser)
    parser.add_argument("--dataset", required=True, metavar="NAME", help="labelled data set to fit on")
    parser.add_argument("--pixels", type=int, default=500, metavar="N", help="pixels drawn from a frame (default 500)")
    parser.add_argument("--max-videos", type=int, default=0, metavar="N", help="first N videos only; 0: all")
    _options.trust_option(parser)
    _options.overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Fit and print."""
    from the_mask.engine import RunOptions
    from the_mask.engine.predict import run_calibration

    options = RunOptions(args.config_file, args.opts, trust_pickle=args.trust_pickle)
    found = run_calibration(options, args.dataset, args.pixels, args.max_videos)
    print(
        f"temperature {found.temperature:.4f}: {found.loss_before:.4f} -> {found.loss_after:.4f} nats per pixel of "
        f"{args.dataset}"
    )
