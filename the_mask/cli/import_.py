"""Import a data set of another tool or benchmark for training.

Writes OUTPUT/data/<video>/{origin,mask}, train.txt, val.txt, classes.json and dataset.py, which registers
NAME_train and NAME_val. See docs/import.md for the formats.

  the-mask import task.zip --format cvat-masks --output mine
  the-mask import annotations.xml --format cvat-video --video drive.mp4 --every 5 --output mine
  the-mask check mine_train --import mine/dataset.py
  the-mask train --model street-mask --data mine OUTPUT_DIR output/mine
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

EXPECTED = ("FileExistsError",)
# Copied from the_mask.data.importers, which imports numpy; a test compares them.
FORMATS = (
    *("ids", "colors", "cvat-masks", "cvat-images", "cvat-video", "davis", "mapillary", "ade", "coco"),
    *("panoptic", "cityscapes-vps", "vipseg", "ytvis", "labelme", "label-studio", "video"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("source", type=Path, help="folder, file, or .zip")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new folder")
    parser.add_argument("--name", default="", help="of the data set; default: the folder's")
    parser.add_argument("--frames", type=Path, metavar="DIR", help="pictures, if not next to the annotations")
    parser.add_argument(
        "--video", type=Path, metavar="FILE", help="take the frames from this video, or a folder of them"
    )
    parser.add_argument(
        "--every", type=int, metavar="N", help="of a video: every Nth frame, and all labelled ones (default: 1)"
    )
    parser.add_argument(
        "--fps", type=float, metavar="RATE", help="of a video: frames per second, and all labelled ones"
    )
    parser.add_argument("--first-frame", type=int, metavar="N", help="number of a video's first frame (default: 0)")
    parser.add_argument("--stills", action="store_true", default=None, help="make every picture a separate video")
    parser.add_argument(
        "--masks", type=Path, metavar="DIR", help="panoptic, cityscapes-vps, vipseg: PNGs of the segments"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="colors, mapillary: names and colours; CSV or JSON")
    parser.add_argument(
        "--classes",
        dest="names",
        type=lambda text: [name.strip() for name in text.split(",")],
        metavar="A,B,...",
        help="ids, davis, ade, labelme, label-studio, video: class names in their order",
    )
    parser.add_argument(
        "--val",
        type=share_or_names,
        default=0.2,
        metavar="SHARE|A,B,...",
        help="whole videos for validation: with about this share of the labelled frames, or these (default: 0.2)",
    )


def share_or_names(text: str) -> float | list[str]:
    """A number, or names with commas between them."""
    try:
        return float(text)
    except ValueError:
        return [name.strip() for name in text.split(",")]


def run(args: argparse.Namespace) -> None:
    """Import, then print what was found and the next command."""
    import json

    from the_mask.data.importers import Sampling, import_dataset
    from the_mask.inference.live.frame_source import check_fps

    options = {key: getattr(args, key) for key in ("frames", "masks", "table", "names")}
    sampling = None
    if args.every is not None and args.fps is not None:
        raise ValueError(f"--every {args.every} and --fps {args.fps:g}: give one of them")
    if (args.every, args.fps, args.first_frame) != (None, None, None):
        every = 1 if args.every is None else args.every
        sampling = Sampling(every, None if args.fps is None else check_fps(args.fps), args.first_frame or 0)
    report = import_dataset(
        args.source,
        args.format,
        args.output,
        name=args.name,
        val_videos=args.val,
        options=options,
        video=args.video,
        sampling=sampling,
        open_video=lambda path: open_video(path, args.format in ("ids", "video")),
        stills=args.stills,
    )
    names = json.loads((args.output / "classes.json").read_text(encoding="utf-8"))["names"]
    print(report)
    print(f"{len(names)} classes: {', '.join(names)}")
    name = args.name or args.output.resolve().name
    print(f"next: the-mask check {name}_train --import {args.output / 'dataset.py'}")
    print(f"then: the-mask train --model street-mask --data {args.output} OUTPUT_DIR output/{name}")


def open_video(path: Path, square_pixels: bool = False) -> Iterator[tuple[np.ndarray, float]]:
    """Frames of a video with their times, by the library's own reader.

    Annotation tools show the stored pixels; ``the-mask segment`` makes those of anamorphic video square.
    """
    from the_mask.inference.live.sources import open_source

    with open_source(path, square_pixels=square_pixels) as source:
        for frame in source.timed():
            yield frame.image, frame.seconds
