"""``the-mask segment --manifest``: segment the videos of an archive with many workers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

# Copied from the_mask.inference.archive, which imports torch; a test compares them.
ENGINES = ("local", "ray")
ERRORS_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of an archive."""
    archive = parser.add_argument_group("many videos (docs/archives.md)")
    archive.add_argument(
        "--manifest",
        type=Path,
        metavar="JSONL",
        help='instead of INPUT: a line {"video": ..., "output": ..., "options": {...}} per video; -o is a folder',
    )
    archive.add_argument(
        "--engine", default="local", choices=ENGINES, help="processes of this machine, or a Ray cluster"
    )
    archive.add_argument("--workers", type=int, default=0, metavar="N", help="default: one per device")
    archive.add_argument(
        "--threads", type=int, default=0, metavar="N", help="of each worker; default: an equal share of the cores"
    )
    archive.add_argument(
        "--retries", type=int, default=2, metavar="N", help="further attempts at a video whose worker died (default: 2)"
    )


def check(args: argparse.Namespace) -> Path:
    """Check the options; returns the output folder.

    Raises:
        ValueError: options that belong to a single video, or numbers below 0.
    """
    if len(args.output) != 1:
        raise ValueError("--manifest takes one -o: the folder of all outputs")
    for name, given in (
        ("--contact-sheet", args.contact_sheet),
        ("--asynchronous", args.asynchronous),
        ("--annotations", args.annotations),
    ):
        if given:
            raise ValueError(f"{name} is for one video, not for --manifest")
    for name in ("workers", "threads", "retries"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name)}: expected 0 or more")
    return Path(args.output[0]).absolute()


def run(args: argparse.Namespace, cfg: Any, palette: Any, model: str) -> int:
    """Segment the videos that are not done yet; returns the exit code: 1 if a video failed, 130 after Ctrl-C."""
    from the_mask.data.files import file_digest
    from the_mask.engine.output_lock import claimed
    from the_mask.engine.signals import interrupted_by_signals
    from the_mask.inference.archive import (
        Results,
        VideoOptions,
        WorkerSetup,
        make_workers,
        read_manifest,
        segment_archive,
    )
    from the_mask.weights.reading import locate_weights

    folder = check(args)
    options = VideoOptions(
        args.alpha, not args.no_legend, args.show_input, args.palette, args.fps, args.audio, args.max_frames
    )
    tasks = read_manifest(args.manifest, options)
    weights = cfg.MODEL.WEIGHTS
    identity = {
        "model": model,
        "weights_sha256": file_digest(locate_weights(weights)) if weights else "",
        "config_sha256": config_digest(cfg),
        "backend": args.backend,
        "precision": args.precision,
        "calibrate": args.calibrate and str(Path(args.calibrate).absolute()),
    }
    with interrupted_by_signals(), claimed(folder, "run", "choose another -o"):
        results = Results(folder, identity)
        setup = WorkerSetup(
            WorkerSetup.packed(cfg),
            palette,
            str(folder),
            model,
            args.backend,
            args.precision,
            identity["calibrate"],
            args.trust_pickle,
            args.threads,
        )
        workers = make_workers(args.engine, setup, args.workers, cfg.MODEL.DEVICE)
        try:
            summary = segment_archive(tasks, results, workers, retries=args.retries)
        except KeyboardInterrupt:
            print(f"stopped; finished videos are in {results.path}, the same command continues")
            return 130
    speed = summary.frames / summary.seconds if summary.seconds else 0.0
    before = f", {summary.before} were done before" if summary.before else ""
    print(
        f"{summary.done} of {len(tasks)} videos ({summary.frames} frames) in {summary.seconds:.1f} s "
        f"({speed:.1f} frames/s){before}: {results.path}"
    )
    if not summary.failed:
        return 0
    for line, error in sorted(summary.errors.items())[:ERRORS_SHOWN]:
        print(f"{args.manifest}, line {line} failed: {error}")
    more = f"; {summary.failed - ERRORS_SHOWN} more stand in the results" if summary.failed > ERRORS_SHOWN else ""
    print(f"{summary.failed} failed{more}; the same command tries them again")
    return 1


def config_digest(cfg: Any) -> str:
    """SHA-256 of the config keys that affect results, without devices and paths."""
    import hashlib

    own = cfg.clone()
    own.defrost()
    own.MODEL.DEVICE, own.MODEL.WEIGHTS, own.OUTPUT_DIR = "", "", ""
    return hashlib.sha256(own.dump().encode()).hexdigest()
