#!/usr/bin/env python
"""Train a mask refiner (CascadePSP) on perturbed masks of DATASETS.TRAIN.

tools/train_refiner.py --config-file configs/camvid/mask2former_r18_cpu.yaml --output output/refiner \
    MODEL.REFINER.WIDTH 16 MODEL.REFINER.MAX_ITER 2000

Then: tools/train_net.py --eval-only ... MODEL.REFINER.WIDTH 16 TEST.REFINER.WEIGHTS output/refiner/refiner_final.pth
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from the_mask.config import load_config
from the_mask.engine import exit_code
from the_mask.engine.logs import setup_logging
from the_mask.engine.refiner_trainer import CHECKPOINT, train_refiner


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="YAML", help="data set and MODEL.REFINER")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help=f"folder for {CHECKPOINT}")
    parser.add_argument("--resume", action="store_true", help="continue from the file in DIR")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides, at the end")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_logging(None)

    def run() -> None:
        figures = train_refiner(load_config(args.config_file, args.opts), args.output, args.resume)
        print(f"{args.output / CHECKPOINT}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))

    return exit_code(run)


if __name__ == "__main__":
    raise SystemExit(main())
