"""Write predictions in the format of an annotation tool.

PREDICTIONS is a folder that `the-mask segment` or `the-mask predict` has written. docs/import.md has the formats.

  the-mask annotations labels/ --format cvat-masks --classes mine/classes.json --video-task --output for_cvat
  the-mask annotations labels/ --format label-studio --classes road,car,tree --frames frames --output for_label_studio
  the-mask annotations predictions/ --format coco --dataset vspw_val --output json
"""

from __future__ import annotations

import argparse
from pathlib import Path

EXPECTED = ("FileExistsError",)
# Copied from the_mask.data.exporters, which imports numpy; a test compares them.
FORMATS = ("coco", "panoptic", "ytvis", "cvat-masks", "cvat-video", "label-studio", "fiftyone")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("source", type=Path, metavar="PREDICTIONS", help="folder of PNGs, by video or flat")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new folder")
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument("--classes", metavar="FILE", help="classes.json, a CSV of class, r, g, b, or names A,B,...")
    classes.add_argument("--dataset", metavar="NAME", help="registered data set with the same classes")
    parser.add_argument("--import", dest="modules", action="append", default=[], metavar="MODULE", help="registers it")
    parser.add_argument(
        "--values", choices=("train-ids", "raw"), default="train-ids", help="with --dataset: kind of values in the PNGs"
    )
    parser.add_argument("--frames", type=Path, metavar="DIR", help="images, for their names and sizes")
    parser.add_argument("--suffix", default=".jpg", help="suffix of image names without --frames (default: .jpg)")
    parser.add_argument(
        "--video-task", action="store_true", help="cvat-masks: name frames as CVAT names those of videos"
    )
    parser.add_argument("--url", metavar="PREFIX", help="label-studio: prefix of image names")
    parser.add_argument("--model", default="", metavar="TEXT", help="name of the model, for formats that store it")


def run(args: argparse.Namespace) -> None:
    """Export, and print what was written."""
    from dataclasses import replace

    from the_mask.data import exporters, import_dataset_modules
    from the_mask.data.importers.common import frame_number

    if not args.source.is_dir():
        raise FileNotFoundError(f"folder of predictions {args.source} does not exist")
    import_dataset_modules(args.modules)
    if args.dataset:
        classes = exporters.dataset_classes(args.dataset, args.values)
    elif args.classes:
        classes = exporters.given_classes(args.classes)
    else:
        stored = exporters.stored_classes(args.source)
        if stored is None:
            raise ValueError(f"{args.source} does not say what its classes are: give --classes or --dataset")
        classes = stored
    if args.url is not None and args.format != "label-studio":
        raise ValueError(f"--url {args.url}: only --format label-studio has image addresses")
    if args.video_task and args.format != "cvat-masks":
        raise ValueError("--video-task: only --format cvat-masks uses these names")
    options = {} if args.url is None else {"url": args.url}
    with exporters.FORMATS[args.format](args.output, classes, model=args.model, **options) as exporter:
        for frame in exporters.read_predictions(args.source, classes, args.frames, args.suffix):
            if args.video_task:
                number = frame_number(frame.name)
                if number is None:
                    raise ValueError(
                        f"video {frame.video}, frame {frame.name}: --video-task needs names that end in digits"
                    )
                frame = replace(frame, name=exporter.frame_name.format(number))
            exporter.write(frame)
    print(exporter.report)
    shown = [str(path) for path in exporter.report.files]
    print("\n".join([*shown[:10], *([f"and {len(shown) - 10} more"] if len(shown) > 10 else [])]))
