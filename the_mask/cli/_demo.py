"""The steps of ``the-mask demo``: data, two trainings, evaluations, pictures, tables."""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import the_mask
from the_mask.data import dataset_root, get_records, register_all
from the_mask.data.synthetic import make_moving_shapes
from the_mask.engine import train_two_stage
from the_mask.engine.two_stage import STAGES
from the_mask.evaluation import constant_baseline
from the_mask.evaluation.report import percent
from the_mask.inference.rendering.comparison import compare_videos

FIGURES = ("mIoU", "VC8", "VC16", "VC8_compat", "VC16_compat", "pACC")


class StepTimer:
    """Prints the name of each step and keeps its wall time in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time the block."""
        print(f"\n=== {name} ===", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)


def run_demo(args: argparse.Namespace) -> dict[str, Any]:
    """Run all steps; returns the summary for ``summary.json``."""
    timer = StepTimer()
    register_all()
    with timer.step("data"):
        tree = dataset_root() / "moving_shapes"
        made = make_data(tree, args.train_videos, args.val_videos)
        print(f"{tree}: {'made' if made else 'already there'}")

    configs = (args.one_frame_config, args.temporal_config)
    results, finals = train_two_stage(
        configs, args.output, args.opts, resume=args.resume, save_predictions=True, step=timer.step
    )
    cfg = finals[-1]
    dataset = cfg.DATASETS.TEST[0]
    constant_class, baseline = constant_baseline(dataset, cfg.TEST.VC_WINDOWS)
    with timer.step("render"):
        titles = {
            f"{stage.replace('_', ' ')}: {results[stage]['mIoU']:.1f} mIoU": Path(final.TEST.SAVE_PREDICTIONS)
            for stage, final in zip(STAGES, finals, strict=True)
        }
        video, sheet = args.output / "demo.mp4", args.output / "contact_sheet.png"
        compare_videos(dataset, get_records(dataset)[: args.show_videos], titles, video, sheet)
    return {
        "dataset": dataset,
        "constant_class": constant_class,
        "results": {"constant": finite(baseline["sem_seg"]), **{s: finite(results[s]) for s in STAGES}},
        "seconds": {**timer.seconds, "total": round(sum(timer.seconds.values()), 2)},
        "machine": {
            "the_mask": the_mask.__version__,
            "platform": platform.platform(),
            "cpu_count": os.cpu_count(),
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "device": cfg.MODEL.DEVICE,
        },
        "files": {"video": str(video), "contact_sheet": str(sheet), "weights": cfg.MODEL.WEIGHTS},
    }


def make_data(tree: Path, train_videos: int, val_videos: int) -> bool:
    """Make moving_shapes unless it exists with the same settings; returns whether it was made.

    Raises:
        ValueError: it exists with other settings.
    """
    try:
        return make_moving_shapes(tree, train_videos=train_videos, val_videos=val_videos)
    except FileExistsError as error:
        raise ValueError(f"{error} (datasets/make_moving_shapes.py --force makes it anew)") from error


def finite(figures: dict[str, float]) -> dict[str, float | None]:
    """Figures rounded for JSON, which has no NaN."""
    return {name: None if math.isnan(value) else round(value, 4) for name, value in figures.items()}


def summary_text(summary: dict[str, Any]) -> str:
    """The tables that are printed at the end."""
    names = {
        "constant": f"constant prediction ({summary['constant_class']})",
        "one_frame": "one frame",
        "temporal": "temporal",
    }
    rows = [
        [names[key], *(percent(math.nan if figures.get(f) is None else figures[f] / 100) for f in FIGURES)]
        for key, figures in summary["results"].items()
    ]
    scores = tabulate(rows, [summary["dataset"], *FIGURES], disable_numparse=True, colalign=("left", *["right"] * 6))
    times = tabulate([[name, f"{seconds:.1f}"] for name, seconds in summary["seconds"].items()], ["step", "seconds"])
    files = "\n".join(f"{name}: {path}" for name, path in summary["files"].items())
    return f"{scores}\n\n{times}\n\n{files}"
