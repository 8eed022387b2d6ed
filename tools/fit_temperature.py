#!/usr/bin/env python
"""Fit the temperature of a model's scores for TEST.ENSEMBLE.NORMALIZE temperature (or TEST.VIEWS.NORMALIZE).

tools/fit_temperature.py --config-file configs/camvid/mask2former_r18_cpu.yaml --dataset camvid_train \
    MODEL.WEIGHTS model_final.pth

Fit it on frames that the ensemble is not judged on; frames the model was trained on give too low a temperature.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from the_mask.engine import RunOptions, exit_code
from the_mask.engine.predict import run_calibration


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="YAML")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="labelled data set to fit on")
    parser.add_argument("--pixels", type=int, default=500, metavar="N", help="pixels drawn from a frame (default 500)")
    parser.add_argument("--max-videos", type=int, default=0, metavar="N", help="first N videos only; 0: all")
    parser.add_argument("--trust-pickle", action="store_true", help="open weights files that can run code (.pkl)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides, at the end")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    options = RunOptions(args.config_file, args.opts, trust_pickle=args.trust_pickle)

    def run() -> None:
        found = run_calibration(options, args.dataset, args.pixels, args.max_videos)
        print(
            f"temperature {found.temperature:.4f}: {found.loss_before:.4f} -> {found.loss_after:.4f} nats per pixel of "
            f"{args.dataset}"
        )

    return exit_code(run)


if __name__ == "__main__":
    raise SystemExit(main())
