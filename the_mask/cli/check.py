"""Check a data set and list every defect with its file.

The exit code is 1 if there is any defect, and 2 if nothing could be checked because the name is unknown or the data set
does not exist.

  the-mask check camvid_train
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from the_mask.cli import _options

if TYPE_CHECKING:
    from the_mask.data.check import CheckReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("name", help="name of the data set, e.g. camvid_train")
    _options.import_option(parser)
    parser.add_argument("--max-files", type=int, metavar="N", help="read only N frames, spread evenly (default: all)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that read files (default: 1)")
    parser.add_argument("--show", type=int, metavar="N", help="list only the first N problems (default: all)")


def run(args: argparse.Namespace) -> int:
    """Check and print; returns the exit code."""
    from tqdm import tqdm

    from the_mask.data import import_dataset_modules
    from the_mask.data.check import check_dataset

    def progress(items: Iterable[Any], total: int) -> Iterable[Any]:
        return tqdm(items, total=total, unit="frame", disable=None, leave=False)

    try:
        import_dataset_modules(args.modules)
        report = check_dataset(args.name, args.max_files, args.jobs, progress)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_report(report, args.show)
    return 0 if report.ok else 1


def print_report(report: CheckReport, show: int | None) -> None:
    """Summary table, warnings, table of problems by kind, then one line per problem."""
    from collections import Counter

    from tabulate import tabulate

    from the_mask.data import get_class_names

    sizes = ", ".join(f"{w}x{h} ({count})" for (h, w), count in report.sizes.most_common(4))
    labelled = int(report.class_pixels.sum()) + report.ignored_pixels
    names = get_class_names(report.name)
    absent = [name for name, count in zip(names, report.class_pixels) if count == 0]
    rows = [
        ("videos", report.videos),
        ("frames", report.frames),
        ("frames with a mask", report.masks),
        ("frames read", report.frames_checked),
        ("sizes, width x height (frames)", sizes + (", ..." if len(report.sizes) > 4 else "")),
        ("classes", len(names)),
        ("classes without a pixel", f"{len(absent)}" + (f": {', '.join(absent[:6])}" if absent else "")),
        ("ignored pixels", f"{report.ignored_pixels / labelled:.2%}" if labelled else "-"),
        ("problems", len(report.problems)),
    ]
    print(tabulate(rows, headers=[report.name, ""], tablefmt="simple", disable_numparse=True))
    for warning in report.warnings:
        print(f"\nwarning: {warning}")
    if report.problems:
        kinds = Counter(problem.kind for problem in report.problems)
        print("\n" + tabulate(sorted(kinds.items()), headers=["problem", "count"], tablefmt="simple") + "\n")
        for problem in report.problems[:show]:
            print(f"{problem.kind}: {problem.file}: {problem.message}")
        if show is not None and show < len(report.problems):
            print(f"... and {len(report.problems) - show} more (--show)")
