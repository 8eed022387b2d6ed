#!/usr/bin/env python3
"""Make the train-id masks of Cityscapes from the label-id masks of its release. See datasets/README.md.

For every gtFine/<split>/<city>/*_gtFine_labelIds.png (label ids 0..33) a file *_gtFine_labelTrainIds.png is written to
the same folder: train ids 0..18, and 255 for classes that are not evaluated. Existing files are kept, and one
that its source does not give is an error; --force writes all of them again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from the_mask.data.datasets import dataset_root
from the_mask.data.io import apply_label_table, read_label_raw, write_picture

SOURCE, TARGET = "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"
# Label ids of the 19 evaluated classes, in the order of their train ids.
EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# Train id of each label id 0..33.
TABLE = tuple(EVALUATED.index(label) if label in EVALUATED else 255 for label in range(34))


def convert(path: Path, force: bool = False) -> bool:
    """Write the train ids of one mask; returns whether the file was written.

    Raises:
        ValueError: unreadable, values other than label ids, or an existing file that differs.
    """
    target = path.with_name(path.name.removesuffix(SOURCE) + TARGET)
    label = apply_label_table(read_label_raw(path), TABLE, path)
    if target.exists() and not force:
        if not np.array_equal(read_label_raw(target), label):
            raise ValueError(
                f"{target} is not what {path.name} gives: its source has changed, or another program made it; "
                "--force replaces it"
            )
        return False
    write_picture(target, label.astype(np.uint8))
    return True


def prepare_cityscapes(root: Path, jobs: int = 1, force: bool = False) -> tuple[int, int]:
    """Convert all masks of ``root/gtFine``.

    Returns:
        Number of files written, and of files that existed already.

    Raises:
        FileNotFoundError: no label-id mask below ``root/gtFine``.
        ValueError: a bad mask; the masks before it have been written.
    """
    masks = sorted((root / "gtFine").rglob(f"*{SOURCE}"))
    if not masks:
        raise FileNotFoundError(f"{root / 'gtFine'} holds no *{SOURCE}; unpack gtFine_trainvaltest.zip into {root}")
    written = sum(_map(partial(convert, force=force), masks, jobs))
    return written, len(masks) - written


def _map(function: partial[bool], masks: list[Path], jobs: int) -> Iterable[bool]:
    if jobs <= 1:
        yield from map(function, masks)
        return
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(function, masks)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="default: cityscapes under $DETECTRON2_DATASETS or ./datasets")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="threads (default: 1)")
    parser.add_argument("--force", action="store_true", help="overwrite existing masks")
    args = parser.parse_args(argv)
    root = args.root or dataset_root() / "cityscapes"
    try:
        written, there = prepare_cityscapes(root, args.jobs, args.force)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{root}: {written} masks written, {there} were there already")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
