#!/usr/bin/env python3
"""Sort the 11-class CamVid release into one folder per sequence. See datasets/README.md.

The release has flat folders train, trainannot, val, valannot and (optionally) test, testannot with images
``<sequence>_<frame number>.png`` (or .jpg) and masks of the same stem whose values are class ids 0..10 and 11 for void.
The result is ``<output>/<split>/<sequence>/{origin,mask}/``, which the_mask registers as camvid_{train,val,test}.

With --frames VIDEOS the frames before each labelled one are decoded from the source videos in that folder (0005VD,
0006R0 and 0016E5 as MXF, 01TP as AVI; file names must contain these). The result is ``camvid_frames``, registered as
camvid_frames_{train,val,test}: each run of consecutive frames is a video, and only the labelled frames have masks.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from the_mask.data.classes import load_class_list
from the_mask.data.datasets import dataset_root
from the_mask.data.frame_files import files_by_stem
from the_mask.data.io import check_same_size, illegal_values, read_image, read_label_raw, write_picture
from the_mask.data.registry import IMAGE_SUFFIXES, natural_key
from the_mask.data.source_frames import alignment_problem, consecutive_runs, memory_numbers, shrink, walk_video
from the_mask.data.whole_folder import whole_folder
from the_mask.inference.live.sources import open_source

VIDEO_SUFFIXES = (".mxf", ".avi", ".mp4", ".mov", ".mkv")
# Name of the video of each sequence, and frame number minus position in the video. The test frames of Seq05VD are
# numbered from 0 in 0005VD; those of 0016E5 are one behind, those of 0001TP ahead.
SOURCES = {"Seq05VD": ("0005VD", 0), "0006R0": ("0006R0", 0), "0016E5": ("0016E5", -1), "0001TP": ("01TP", 6660)}
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
    """Frames of a split in time order, and its defects: a missing image or mask, an unexpected name.

    Only names are checked; :func:`verify_frame` checks the content of the files.
    """
    errors: list[str] = []
    images = _by_stem(source / split, IMAGE_SUFFIXES, "frame", errors)
    masks = _by_stem(source / f"{split}annot", (".png",), "mask", errors, images)
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


def _by_stem(
    folder: Path, suffixes: tuple[str, ...], what: str, errors: list[str], stems: Iterable[str] = ()
) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; --source takes the folder with train, trainannot, val, ...")
    files, problems = files_by_stem(folder, suffixes, what, list(stems))
    errors += [f"{problem.file}: {problem.message}" for problem in problems]
    return files


def verify_frame(frame: Frame) -> str | None:
    """The problem with the two files of a frame, or None."""
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
    """Verify the release and write the tree atomically.

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
    frames = read_release(source, output, link, force)
    counts: Counter[tuple[str, str]] = Counter()
    with whole_folder(output) as partial:
        for split, members in frames.items():
            for frame in members:
                folder = partial / split / frame.sequence
                place(frame.image, folder / "origin" / frame.image.name, link)
                place(frame.mask, folder / "mask" / frame.mask.name, link)
                counts[split, frame.sequence] += 1
    return counts


def read_release(source: Path, output: Path, link: str, force: bool) -> dict[str, list[Frame]]:
    """Verified frames of every split. Raises as :func:`prepare_camvid`."""
    if link not in LINK_MODES:
        raise ValueError(f"link {link!r}: expected one of {', '.join(LINK_MODES)}")
    if output.exists() and any(output.iterdir()) and not force:
        raise FileExistsError(f"{output} exists; pass --force to replace it")
    frames: dict[str, list[Frame]] = {}
    errors = []
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
    return frames


def find_video(folder: Path, sequence: str) -> Path:
    """The source video of a sequence.

    Raises:
        FileNotFoundError: none, or no such folder.
        ValueError: an unknown sequence, or more than one file.
    """
    if sequence not in SOURCES:
        raise ValueError(f"no source video is known for sequence {sequence}; known: {', '.join(SOURCES)}")
    key = SOURCES[sequence][0]
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; --frames takes the folder of the source videos")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES and key.lower() in p.stem.lower())
    if not files:
        raise FileNotFoundError(f"{folder} has no video of {sequence} ({key}*{{{','.join(VIDEO_SUFFIXES)}}})")
    if len(files) > 1:
        raise ValueError(f"{folder} has several videos of {sequence}: {', '.join(p.name for p in files)}")
    return files[0]


def decode_sequence(
    sequence: str, members: dict[str, list[Frame]], videos: Path, output: Path, memory: int, shift: int, link: str
) -> Counter[tuple[str, str]]:
    """Write the runs of one sequence, labelled and decoded frames, after verifying the alignment.

    Args:
        sequence: name of the sequence.
        members: its labelled frames per split.
        videos: folder of the source videos.
        output: folder to write.
        memory: frames to decode before each labelled one.
        shift: number of frames by which this copy of the video is late; negative if its start was cut off.
        link: how labelled files are copied or linked.

    Returns:
        Number of frames per (split, sequence).
    """
    path = find_video(videos, sequence)
    numbers = {split: [split_name(frame.image.stem)[1] for frame in frames] for split, frames in members.items()}
    runs = {
        split: consecutive_runs([*labelled, *memory_numbers(labelled, memory)]) for split, labelled in numbers.items()
    }
    images = {split_name(f.image.stem)[1]: f.image for frames in members.values() for f in frames}
    folders: dict[int, list[tuple[Path, tuple[int, int]]]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for split, frames in members.items():
        stems = dict(zip(numbers[split], frames, strict=True))
        height, width = read_image(frames[0].image).shape[:2]
        # Decoded frames are named as in the release.
        head, digits = re.fullmatch(r"(\w*?)(\d+)", frames[0].image.stem.removeprefix(f"{sequence}_")).groups()  # type: ignore[union-attr]
        for run in runs[split]:
            folder = output / split / f"{sequence}_{run[0]:0{len(digits)}d}"
            for number in run:
                counts[split, sequence] += 1
                if number in stems:
                    place(stems[number].image, folder / "origin" / stems[number].image.name, link)
                    place(stems[number].mask, folder / "mask" / stems[number].mask.name, link)
                    continue
                target = folder / "origin" / f"{sequence}_{head}{number:0{len(digits)}d}.png"
                folders.setdefault(number, []).append((target, (height, width)))

    def write(number: int, frame: np.ndarray) -> None:
        for target, frame_size in folders[number]:
            write_picture(target, shrink(frame, frame_size), durable=False)

    first = SOURCES[sequence][1] - shift
    # The labelled images have the stored pixels, which are not square in 0006R0.
    with open_source(str(path), square_pixels=False) as source:
        scores = walk_video(source, first, images, folders, write)
    problem, mend = alignment_problem(scores)
    if problem:
        hint = f"; if this copy of the video is cut differently, pass --shift {sequence}={shift + mend}" if mend else ""
        raise ValueError(f"{path} does not fit the labelled frames of {sequence}: {problem}{hint}")
    worst = min(scores, key=lambda number: scores[number][0])
    print(f"{sequence}: {path.name} is aligned, {scores[worst][0]:.1f} dB at the least (frame {worst})")
    return counts


def prepare_camvid_frames(
    source: Path,
    videos: Path,
    output: Path,
    memory: int = 4,
    shifts: dict[str, int] | None = None,
    link: str = "copy",
    force: bool = False,
) -> Counter[tuple[str, str]]:
    """Verify the release, decode the frames before each labelled one, and write the tree if all are aligned.

    Args:
        source, output, link, force: as for :func:`prepare_camvid`.
        videos: folder of the source videos.
        memory: frames before each labelled one.
        shifts: per sequence, the number of frames by which this copy of its video is late; negative if its start was
            cut off.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: as :func:`prepare_camvid`; a video is missing, ambiguous, too
            short, unreadable, or its frames are not those of the release.
    """
    shifts = shifts or {}
    if memory < 1:
        raise ValueError(f"--memory {memory}: expected at least 1")
    unknown = sorted(shifts.keys() - SOURCES.keys())
    if unknown:
        raise ValueError(f"--shift {unknown[0]}: expected one of {', '.join(SOURCES)}")
    frames = read_release(source, output, link, force)
    counts: Counter[tuple[str, str]] = Counter()
    with whole_folder(output) as partial:
        for sequence in dict.fromkeys(frame.sequence for members in frames.values() for frame in members):
            members = {split: [f for f in found if f.sequence == sequence] for split, found in frames.items()}
            members = {split: found for split, found in members.items() if found}
            counts += decode_sequence(sequence, members, videos, partial, memory, shifts.get(sequence, 0), link)
    return counts


def parse_shift(text: str) -> tuple[str, int]:
    """``0016E5=-1`` -> (``0016E5``, -1)."""
    match = re.fullmatch(r"(\w+)=([+-]?\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected SEQUENCE=FRAMES, such as 0016E5=-1")
    return match[1], int(match[2])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of the release (train, trainannot, ...)")
    parser.add_argument(
        "--output", type=Path, help="default: camvid (camvid_frames) under $DETECTRON2_DATASETS or ./datasets"
    )
    parser.add_argument("--link", choices=LINK_MODES, default="copy", help="copy or link files (default: copy)")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument("--frames", type=Path, metavar="VIDEOS", help="folder of the source videos: decode frames")
    parser.add_argument(
        "--memory", type=int, default=4, metavar="T", help="frames before each labelled one (default: 4)"
    )
    parser.add_argument(
        "--shift",
        type=parse_shift,
        action="append",
        default=[],
        metavar="SEQUENCE=FRAMES",
        help="this copy of the video is late by so many frames (negative: its start was cut off)",
    )
    args = parser.parse_args(argv)
    output = args.output or dataset_root() / ("camvid_frames" if args.frames else "camvid")
    try:
        if args.frames:
            shifts = dict(args.shift)
            counts = prepare_camvid_frames(args.source, args.frames, output, args.memory, shifts, args.link, args.force)
        else:
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
