#!/usr/bin/env python3
"""Write moving_shapes, the procedural video data set, as a VSPW tree. See datasets/README.md."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from the_mask.data.datasets import dataset_root
from the_mask.data.datasets.moving_shapes import folder_name
from the_mask.data.io import write_picture
from the_mask.data.synthetic import VERSIONS, SceneSize, contact_sheet, make_moving_shapes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, help="default: moving_shapes, or moving_shapes_v3, under $DETECTRON2_DATASETS"
    )
    parser.add_argument("--version", type=int, choices=list(VERSIONS), default=2, help="3: pairs differ by colour, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-videos", type=int, default=480)
    parser.add_argument("--val-videos", type=int, default=64)
    parser.add_argument("--frames", type=int, default=SceneSize.frames, help="frames per video")
    parser.add_argument("--height", type=int, default=SceneSize.height)
    parser.add_argument("--width", type=int, default=SceneSize.width)
    parser.add_argument("--force", action="store_true", help="replace an existing tree")
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG", help="also draw some train videos")
    args = parser.parse_args(argv)

    output = args.output or dataset_root() / folder_name(args.version)
    size = SceneSize(args.frames, args.height, args.width)
    start = time.perf_counter()
    try:
        written = make_moving_shapes(
            output, args.seed, args.train_videos, args.val_videos, size, args.force, args.version
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.contact_sheet:
        sheet = contact_sheet(args.seed, min(6, args.train_videos), size, version=args.version)
        write_picture(args.contact_sheet, sheet)
    if written:
        videos = args.train_videos + args.val_videos
        print(f"{output}: {videos} videos, {videos * args.frames} frames in {time.perf_counter() - start:.1f} s")
    else:
        print(f"{output}: already there with these settings")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
