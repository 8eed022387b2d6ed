"""Count parameters, multiply-adds and training memory of configs.

They are shown next to the published numbers. No weights are needed; the training memory is an estimate.

the-mask stats                                  # every config, as a Markdown table
the-mask stats vspw/mask2former_r50
the-mask stats --update docs/model_zoo.md       # replace the table between the markers of that file
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from the_mask.engine.model_stats import ModelStats

START, END = "<!-- model_stats: start -->", "<!-- model_stats: end -->"
HEADER = """| config | parameters (M) | backbone (M) | published (M) | GMACs of a clip | at | training memory (GiB) |
|---|---|---|---|---|---|---|"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("configs", nargs="*", metavar="YAML", help="paths or names; default: every config")
    parser.add_argument("--update", type=Path, metavar="FILE", help="also put the table into this file")


def run(args: argparse.Namespace) -> None:
    """Print the table, line by line."""
    from the_mask.config import config_names

    text = table(args.configs or config_names())
    if args.update:
        update(args.update, text)


def row(name: str, stats: ModelStats) -> str:
    """One line of the table."""
    from the_mask.engine.model_stats import published

    papers = []
    for entry in published(name):
        number = f"{entry.millions:g}" if entry.part == "model" else f"backbone {entry.millions:.2f}"
        note = f"; {entry.note}" if entry.note else ""
        papers.append(f"{number} ({entry.difference(stats):+.1%}; {entry.source}{note})")
    height, width = stats.size
    memory = stats.training_memory
    cells = (
        f"`{name}`",
        f"{stats.parameters / 1e6:.2f}",
        f"{stats.backbone / 1e6:.2f}" if stats.backbone else "–",
        "<br>".join(papers) or "–",
        "–" if stats.macs is None else f"{stats.macs / 1e9:.1f}",
        f"{stats.frames} × {height}×{width}",
        "–" if memory is None else f"{memory / 2**30:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def table(configs: Sequence[str]) -> str:
    """The table of some configs, given by path or name."""
    from the_mask.config import load_config
    from the_mask.engine.model_stats import model_stats

    lines = [HEADER]
    print(HEADER, flush=True)
    for config in configs:
        lines.append(row(short_name(config), model_stats(load_config(config))))
        print(lines[-1], flush=True)
    return "\n".join(lines)


def short_name(config: str) -> str:
    """The name below the library's configs, or the stem of a path elsewhere."""
    from the_mask.config.compose import config_root, find_config

    found = find_config(config)
    if not found.path.resolve().is_relative_to(config_root().resolve()):
        return Path(config).stem
    folder = found.path.resolve().parent.relative_to(config_root().resolve()).as_posix()
    return f"{folder}/{found.row or found.path.stem}"


def update(path: Path, text: str) -> None:
    """Replace the text between the markers.

    Raises:
        ValueError: the file has no markers.
    """
    from the_mask.data.files import atomic_write

    content = path.read_text(encoding="utf-8")
    before, start, rest = content.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{path}: the lines {START} and {END} are missing")
    atomic_write(path, f"{before}{START}\n{text}\n{END}{after}".encode())
