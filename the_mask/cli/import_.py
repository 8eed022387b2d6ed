"""Make a data set of another tool or benchmark ready for training.

Writes OUTPUT/data/<video>/{origin,mask}, train.txt, val.txt, classes.json and dataset.py, which registers
NAME_train and NAME_val. docs/import.md has the formats.

  the-mask import task.zip --format cvat-masks --output mine
  the-mask check mine_train --import mine/dataset.py
  the-mask train --config camvid/street_mask DATASETS.IMPORT "['mine/dataset.py']" \\
      DATASETS.TRAIN "('mine_train',)" DATASETS.TEST "('mine_val',)" MODEL.SEM_SEG_HEAD.NUM_CLASSES 7
"""

from __future__ import annotations

import argparse
from pathlib import Path

EXPECTED = ("FileExistsError",)
# Those of the_mask.data.importers, which imports numpy; a test compares them.
FORMATS = (
    *("colors", "cvat-masks", "cvat-video", "davis", "coco"),
    *("panoptic", "vipseg", "ytvis", "labelme", "label-studio"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("source", type=Path, help="folder, file, or .zip")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new folder")
    parser.add_argument("--name", default="", help="of the data set; default: the folder's")
    parser.add_argument("--frames", type=Path, metavar="DIR", help="pictures, if not beside the annotations")
    parser.add_argument("--masks", type=Path, metavar="DIR", help="panoptic, vipseg: PNGs of the segments")
    parser.add_argument("--table", type=Path, metavar="CSV", help="colors: class, r, g, b")
    parser.add_argument(
        "--classes",
        dest="names",
        type=lambda text: [name.strip() for name in text.split(",")],
        metavar="A,B,...",
        help="davis, labelme, label-studio: class names in their order",
    )
    parser.add_argument("--val", type=float, default=0.2, metavar="SHARE", help="for validation (default: 0.2)")


def run(args: argparse.Namespace) -> None:
    """Import, then say what was found and how to go on."""
    import json

    from the_mask.data.importers import import_dataset

    options = {key: getattr(args, key) for key in ("frames", "masks", "table", "names")}
    report = import_dataset(args.source, args.format, args.output, name=args.name, val_videos=args.val, options=options)
    names = json.loads((args.output / "classes.json").read_text(encoding="utf-8"))["names"]
    print(report)
    print(f"{len(names)} classes: {', '.join(names)}")
    name = args.name or args.output.name
    print(f"next: the-mask check {name}_train --import {args.output / 'dataset.py'}")
