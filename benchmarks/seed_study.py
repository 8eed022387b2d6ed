#!/usr/bin/env python
"""Train configs with several seeds at equal budget, evaluate, and tabulate mean and standard deviation.

benchmarks/seed_study.py configs/camvid/psp_r18_cpu.yaml configs/camvid/tmanet_r18_cpu.yaml \\
    --seeds 1 2 3 --output output/study --options SOLVER.MAX_ITER 300

Each training is a process with its own folder, OUTPUT/CONFIG_seedN. Finished trainings are kept, so the study can be
interrupted, extended and run again. To study overrides, give a config as LABEL=PATH,KEY=VALUE,...; in the values,
{seed} is the seed and {output} the folder of the study, so that a row can start from the weights of another one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from common import machine
from tabulate import tabulate

from the_mask.engine import exit_code

TRAIN = Path(__file__).resolve().parents[1] / "tools" / "train_net.py"
FIGURES = ("mIoU", "VC8", "VC16")
LOG = "stdout.txt"


@dataclass(frozen=True)
class Row:
    """One line of the table: a config with overrides."""

    label: str
    config: Path
    overrides: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Row:
        """``PATH`` or ``LABEL=PATH,KEY=VALUE,...``; the label of a bare path is the file's name."""
        path, *pairs = text.split(",")
        label, separator, rest = path.partition("=")
        config = Path(rest if separator else path)
        if not config.is_file():
            raise FileNotFoundError(f"{config}: no such config (row {text!r})")
        bad = [pair for pair in pairs if "=" not in pair]
        if bad:
            raise ValueError(f"row {text!r}: {bad[0]!r} is not KEY=VALUE")
        words = tuple(word for pair in pairs for word in pair.split("=", 1))
        return cls(label if separator else config.stem, config, words)


def train(row: Row, seed: int, folder: Path, options: Sequence[str]) -> None:
    """Train and evaluate one seed of a row, unless its figures exist.

    Raises:
        RuntimeError: the training ended with an error; its log is named.
    """
    place = folder / f"{row.label}_seed{seed}"
    if figures(place):
        return
    place.mkdir(parents=True, exist_ok=True)
    own = [word.format(seed=seed, output=folder) for word in row.overrides]
    # Evaluate only at the end: the period is longer than any training.
    command = [sys.executable, str(TRAIN), "--config-file", str(row.config), "OUTPUT_DIR", str(place)]
    command += ["TEST.EVAL_PERIOD", "100000000", "SOLVER.CHECKPOINT_PERIOD", "100000000", *options, *own]
    with (place / LOG).open("w", encoding="utf-8") as log:
        code = subprocess.run([*command, "SEED", str(seed)], stdout=log, stderr=log, check=False).returncode
    if code:
        raise RuntimeError(f"{row.label}, seed {seed}: training ended with code {code}, see {log.name}")


def figures(folder: Path) -> dict[str, float]:
    """Results of a finished training, its median seconds per iteration and the process's peak memory; empty before."""
    file = folder / "metrics.json"
    if not file.is_file():
        return {}
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    results = [line for line in lines if "sem_seg/mIoU" in line]
    if not results:
        return {}
    found = {name: results[-1].get(f"sem_seg/{name}", math.nan) for name in FIGURES}
    memory = re.findall(r"mem (\d+) MiB", (folder / LOG).read_text(encoding="utf-8", errors="replace"))
    seconds = median(line["time"] for line in lines if "time" in line)
    return found | {"s/it": seconds, "MiB": max(map(float, memory), default=math.nan)}


def table(rows: Iterable[Row], seeds: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """Mean, standard deviation (of the sample) and number of finished seeds per row."""
    lines = []
    for row in rows:
        runs = [found for seed in seeds if (found := figures(folder / f"{row.label}_seed{seed}"))]
        line: dict[str, Any] = {"model": row.label, "seeds": len(runs)}
        for name in FIGURES:
            values = [run[name] for run in runs if math.isfinite(run[name])]
            line[name] = mean(values) if values else math.nan
            line[f"sd {name}"] = stdev(values) if len(values) > 1 else math.nan
        for name in ("s/it", "MiB"):
            line[name] = median(run[name] for run in runs) if runs else math.nan
        lines.append(line)
    return lines


def study(args: argparse.Namespace) -> None:
    """Train what is missing, then write ``study.json`` and print the table."""
    rows = [Row.parse(text) for text in args.configs]
    labels = [row.label for row in rows]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two rows have one label: {labels}; give them as LABEL=PATH")
    args.output.mkdir(parents=True, exist_ok=True)
    # Seeds are the outer loop, so that an interrupted study has every row at least once. Rows may use earlier rows.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    if not args.table:
        for seed in args.seeds:
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(lambda row, seed=seed: train(row, seed, args.output, args.options), rows))
    lines = table(rows, args.seeds, args.output)
    report = {"machine": machine(), "options": args.options, "rows": lines}
    (args.output / "study.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(tabulate(lines, headers="keys", floatfmt=".2f", tablefmt="pipe"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="ROW", help="PATH or LABEL=PATH,KEY=VALUE,...")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="trainings in parallel; 1 if a row starts from another"
    )
    parser.add_argument("--table", action="store_true", help="print the table of existing results without training")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY VALUE", help="config overrides of all rows")
    args = parser.parse_args(arguments)
    return exit_code(lambda: study(args), also=(RuntimeError,))


if __name__ == "__main__":
    sys.exit(main())
