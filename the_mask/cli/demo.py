"""Try the whole library on synthetic video: what ``make demo`` runs.

1. makes moving_shapes, version 3, unless it exists;
2. trains the one-frame model, and from its weights the temporal model and, on as many frames, another one-frame model;
3. evaluates all three on the validation videos, next to the best constant prediction;
4. renders input, ground truth and the two predictions of equal training side by side;
5. prints a table and writes OUTPUT/{summary.json,demo.mp4,contact_sheet.png}.

Run it again with --resume to continue after an interruption; without --resume everything is trained again. The same
seed on the same machine gives the same numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from the_mask.cli import _options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--one-frame-config", default="moving_shapes/v3_1f", metavar="YAML")
    parser.add_argument("--longer-config", default="moving_shapes/v3_1f_longer", metavar="YAML")
    parser.add_argument("--temporal-config", default="moving_shapes/v3_video", metavar="YAML")
    parser.add_argument("--output", type=Path, default=Path("output/demo"), metavar="DIR")
    parser.add_argument("--resume", action="store_true", help="continue interrupted trainings, keep finished ones")
    parser.add_argument("--show-videos", type=int, default=6, metavar="N", help="videos rendered (default: 6)")
    parser.add_argument("--train-videos", type=int, default=480, metavar="N", help="of a new data set (default: 480)")
    parser.add_argument("--val-videos", type=int, default=64, metavar="N", help="of a new data set (default: 64)")
    _options.overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Run the demo, write ``summary.json`` and print the tables."""
    from the_mask.cli._demo import run_demo, summary_text
    from the_mask.data.files import write_json

    summary = run_demo(args)
    path = args.output / "summary.json"
    write_json(path, summary)
    print(f"\n{summary_text(summary)}\nsummary: {path}")
