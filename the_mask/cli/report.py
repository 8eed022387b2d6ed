"""Write a report: one HTML file with figures, curves and the worst frames.

Takes one folder of predicted label PNGs, or several to compare. The file can be read without network access.

  the-mask predict --config camvid/street_live_frame --dataset camvid_val --output predictions/a ...
  the-mask report --dataset camvid_val --pred predictions/a --pred predictions/b --output report.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from the_mask.cli import _options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--dataset", required=True, metavar="NAME", help="e.g. vspw_val, camvid_val")
    parser.add_argument(
        "--pred",
        required=True,
        action="append",
        type=Path,
        metavar="DIR",
        help="predictions <video>/<frame>.png; repeat to compare further runs with the first",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="HTML")
    parser.add_argument("--raw", action="store_true", help="PNGs hold raw values, VSPW: 1..124; default: train ids")
    parser.add_argument(
        "--pictures", type=int, default=12, metavar="N", help="number of worst frames to show (default: 12)"
    )
    _options.import_option(parser)


def run(args: argparse.Namespace) -> None:
    """Score the folders and write the page."""
    from the_mask.data import import_dataset_modules
    from the_mask.data.files import check_writable
    from the_mask.engine.logs import setup_logging
    from the_mask.evaluation import evaluate_predictions
    from the_mask.evaluation.html import ReportSink, write_report

    setup_logging(None)
    if args.pictures < 0:
        raise ValueError(f"--pictures {args.pictures}: expected 0 or more")
    if args.output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {args.output}: expected the name of an .html file")
    check_writable(args.output)
    import_dataset_modules(args.modules)
    names = [folder.name for folder in args.pred]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in args.pred]
    runs = []
    for name, folder in zip(names, args.pred, strict=True):
        sink = ReportSink(args.dataset, name, args.pictures)
        results = evaluate_predictions(folder, args.dataset, train_ids=not args.raw, sinks=[sink])
        runs.append(sink.report(results["sem_seg"]))
    path = write_report(args.output, runs)
    print(f"report: {path} ({path.stat().st_size / 2**20:.1f} MiB)")
