#!/usr/bin/env python3
"""Parameters, multiply-adds and estimated training memory of configs, beside the papers' numbers, without weights.

tools/model_stats.py                                  # every config, as a Markdown table
tools/model_stats.py configs/vspw/mask2former_r50.yaml
tools/model_stats.py --update docs/model_zoo.md       # replace the table between the markers of that file
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from the_mask.config import load_config
from the_mask.engine import exit_code
from the_mask.engine.model_stats import ModelStats, model_configs, model_stats, published

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
START, END = "<!-- model_stats: start -->", "<!-- model_stats: end -->"
HEADER = """| config | parameters (M) | backbone (M) | published (M) | GMACs of a clip | at | training memory (GiB) |
|---|---|---|---|---|---|---|"""


def row(name: str, stats: ModelStats) -> str:
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


def table(files: Sequence[Path]) -> str:
    lines = [HEADER]
    print(HEADER, flush=True)
    for path in files:
        inside = CONFIGS in path.resolve().parents
        name = str(path.resolve().relative_to(CONFIGS).with_suffix("")) if inside else path.stem
        lines.append(row(name, model_stats(load_config(path))))
        print(lines[-1], flush=True)
    return "\n".join(lines)


def update(path: Path, text: str) -> None:
    """Replace what stands between the markers."""
    content = path.read_text(encoding="utf-8")
    before, start, rest = content.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{path}: the lines {START} and {END} are missing")
    path.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="*", metavar="YAML", help="default: every file in configs/")
    parser.add_argument("--update", type=Path, metavar="FILE", help="also put the table into this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    files = args.configs or model_configs(CONFIGS)

    def run() -> None:
        text = table(files)
        if args.update:
            update(args.update, text)

    return exit_code(run)


if __name__ == "__main__":
    raise SystemExit(main())
