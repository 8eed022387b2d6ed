"""Train a mask refiner (CascadePSP) on perturbed masks of DATASETS.TRAIN.

  the-mask train-refiner --config camvid/mask2former_r18_cpu --output output/refiner \\
      MODEL.REFINER.WIDTH 16 MODEL.REFINER.MAX_ITER 2000

Then: the-mask evaluate --config ... MODEL.REFINER.WIDTH 16 TEST.REFINER.WEIGHTS output/refiner/refiner_final.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path

from the_mask.cli import _options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    _options.config_option(parser, help="data set and MODEL.REFINER, by path or name")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the checkpoint")
    parser.add_argument("--resume", action="store_true", help="continue from the file in DIR")
    _options.overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Train and print the last figures."""
    from the_mask.config import load_config
    from the_mask.engine.logs import setup_logging
    from the_mask.engine.refiner_trainer import CHECKPOINT, train_refiner

    setup_logging(None)
    figures = train_refiner(load_config(args.config_file, args.opts), args.output, args.resume)
    print(f"{args.output / CHECKPOINT}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
