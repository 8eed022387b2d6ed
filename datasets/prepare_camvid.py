#!/usr/bin/env python3
"""Sort the 11-class CamVid release into one folder per sequence. See datasets/README.md.

The release has flat folders train, trainannot, val, valannot and (optionally) test, testannot with images
``<sequence>_<frame number>.png`` (or .jpg) and masks of the same stem whose values are class ids 0..10 and 11 for void.
The result is ``<output>/<split>/<sequence>/{origin,mask}/``, which the_mask registers as camvid_{train,val,test}.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from the_mask.data.classes import load_class_list
from the_mask.data.datasets import dataset_root
from the_mask.data.io import check_same_size, illegal_values, read_image, read_label_raw
from the_mask.data.registry import IMAGE_SUFFIXES, natural_key

SPLITS = ("train", "val", "test")
LINK_MODES = ("copy", "symlink", "hardlink")


@dataclass(frozen=True)
class Frame:
    """One labelled frame of the release."""

    sequence: str
    image: Path
    mask: Path


def split_name(stem: str) -> tuple[str, int]:
    """Sequence and frame number of a file stem: ``0006R0_f00930`` -> (``0006R0``, 930).

    The release names frames 0001TP_006690, 0006R0_f00930, 0016E5_07959 and Seq05VD_f00000.

    Raises:
        ValueError: another pattern.
    """
    match = re.fullmatch(r"(\w+)_f?(\d+)", stem)
    if match is None:
        raise ValueError(f"{stem}: expected <sequence>_<frame number>, such as 0001TP_006690 or Seq05VD_f00000")
    return match[1], int(match[2])


def read_split(source: Path, split: str) -> tuple[list[Frame], list[str]]:
    """Frames of a split in time order, and its defects: a missing partner, an unexpected name.

    Only names are looked at; :func:`verify_frame` looks into the files.
    """
    errors = []
    images = _by_stem(source / split, IMAGE_SUFFIXES)
    masks = _by_stem(source / f"{split}annot", (".png",))
    errors += [f"{images[stem]}: no mask {split}annot/{stem}.png" for stem in sorted(images.keys() - masks.keys())]
    errors += [f"{masks[stem]}: no image in {split}/" for stem in sorted(masks.keys() - images.keys())]
    frames = []
    for stem in sorted(images.keys() & masks.keys(), key=natural_key):
        try:
            frames.append(Frame(split_name(stem)[0], images[stem], masks[stem]))
        except ValueError as error:
            errors.append(f"{images[stem]}: {error}")
    frames.sort(key=lambda frame: split_name(frame.image.stem))
    return frames, errors


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; --source takes the folder with train, trainannot, val, ...")
    return {p.stem: p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".")}


def verify_frame(frame: Frame) -> str | None:
    """What is wrong inside the two files of a frame, or None."""
    try:
        image, raw = read_image(frame.image), read_label_raw(frame.mask)
        check_same_size(image, raw, frame.image, frame.mask)
    except ValueError as error:
        return str(error)
    illegal = illegal_values(raw, load_class_list("camvid").label_table)
    return f"mask {frame.mask} holds values {illegal}; allowed: 0..11" if illegal else None


def place(source: Path, target: Path, link: str) -> None:
    """Copy or link one file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link == "symlink":
        target.symlink_to(source.resolve())
    elif link == "hardlink":
        os.link(source, target)
    else:
        shutil.copyfile(source, target)


def prepare_camvid(source: Path, output: Path, link: str = "copy", force: bool = False) -> Counter[tuple[str, str]]:
    """Verify the release and write the tree; it appears at ``output`` only when complete.

    Args:
        source: folder of the release.
        output: folder to write.
        link: ``copy``, ``symlink`` or ``hardlink``.
        force: replace an existing ``output``.

    Returns:
        Number of frames per (split, sequence).

    Raises:
        FileNotFoundError: the release, its train or its val split is missing.
        FileExistsError: ``output`` exists and ``force`` is off.
        ValueError: defects of the release, each with its file.
    """
    if link not in LINK_MODES:
        raise ValueError(f"link {link!r}: expected one of {', '.join(LINK_MODES)}")
    if output.exists() and any(output.iterdir()) and not force:
        raise FileExistsError(f"{output} exists; pass --force to replace it")
    frames, errors = {}, []
    for split in SPLITS:
        if split == "test" and not (source / split).is_dir():
            continue
        frames[split], found = read_split(source, split)
        errors += found
        if not frames[split]:
            errors.append(f"{source / split}: no labelled image")
    errors += [error for split in frames.values() for error in map(verify_frame, split) if error]
    if errors:
        raise ValueError(f"{len(errors)} defects in {source}:\n" + "\n".join(errors))

    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    counts: Counter[tuple[str, str]] = Counter()
    try:
        for split, members in frames.items():
            for frame in members:
                folder = partial / split / frame.sequence
                place(frame.image, folder / "origin" / frame.image.name, link)
                place(frame.mask, folder / "mask" / frame.mask.name, link)
                counts[split, frame.sequence] += 1
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of the release (train, trainannot, ...)")
    parser.add_argument("--output", type=Path, help="default: camvid under $DETECTRON2_DATASETS or ./datasets")
    parser.add_argument("--link", choices=LINK_MODES, default="copy", help="how files get there (default: copy)")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    args = parser.parse_args(argv)
    output = args.output or dataset_root() / "camvid"
    try:
        counts = prepare_camvid(args.source, output, args.link, args.force)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for (split, sequence), count in counts.items():
        print(f"{split:5s} {sequence:8s} {count:4d} frames")
    print(f"{output}: {sum(counts.values())} frames")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
