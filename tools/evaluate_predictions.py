#!/usr/bin/env python3
"""Score a folder of predicted label PNGs, written by any program, against a data set. See docs/metrics.md.

Expected: DIR/<video>/<frame>.png, one per frame, one channel, original frame size. Nothing is skipped: missing or bad
files are listed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from the_mask.data import import_dataset_modules
from the_mask.data.files import write_json
from the_mask.engine import exit_code
from the_mask.engine.logs import setup_logging
from the_mask.evaluation import constant_baseline, evaluate_predictions, raft_flow
from the_mask.evaluation.report import summary_table


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pred", type=Path, metavar="DIR", help="folder of predictions")
    what.add_argument("--constant", action="store_true", help="instead: the best constant prediction, as a baseline")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="e.g. vspw_val, camvid_val, moving_shapes_val")
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="module or .py file that registers the data set, as in DATASETS.IMPORT; may be repeated",
    )
    values = parser.add_mutually_exclusive_group()
    values.add_argument("--raw", action="store_true", help="PNGs hold raw values, VSPW: 1..124 (default)")
    values.add_argument("--train-ids", action="store_true", help="PNGs hold train ids 0..K-1")
    parser.add_argument("--vc-windows", type=int, nargs="+", default=[8, 16], metavar="N", help="default: 8 16")
    parser.add_argument("--tc-weights", type=Path, metavar="PTH", help="torchvision RAFT weights; without them no TC")
    parser.add_argument("--tc-videos", type=int, default=0, metavar="N", help="TC over the first N videos; 0: all")
    parser.add_argument("--device", default="cpu", help="where the optical flow runs (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    return parser


def run(args: argparse.Namespace) -> None:
    """What :func:`main` does, with errors as exceptions."""
    import_dataset_modules(args.modules)
    if args.constant:
        class_name, results = constant_baseline(args.dataset, args.vc_windows)
        print(f"{args.dataset}: every pixel predicted as {class_name}\n\n{summary_table(results['sem_seg'])}")
    else:
        results = evaluate_predictions(
            args.pred,
            args.dataset,
            train_ids=args.train_ids,
            windows=args.vc_windows,
            flow=raft_flow(args.tc_weights, args.device) if args.tc_weights else None,
            tc_videos=args.tc_videos,
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        # NaN is not JSON.
        figures = {name: None if value != value else value for name, value in results["sem_seg"].items()}
        write_json(args.json, figures)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_logging(None)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
