"""The steps of ``the-mask demo``: data, two trainings, evaluations, pictures, tables."""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from tabulate import tabulate

import the_mask
from the_mask.config import load_config
from the_mask.data import dataset_root, get_records, register_all
from the_mask.data.datasets.moving_shapes import folder_name, version_of
from the_mask.data.synthetic import make_moving_shapes
from the_mask.engine import train_stage
from the_mask.evaluation import constant_baseline
from the_mask.evaluation.report import percent
from the_mask.inference.rendering.comparison import compare_videos

# What is trained: folder and key of the summary, and its name in tables.
ROWS = {
    "one_frame": "one frame, stage 1",
    "one_frame_longer": "one frame, longer",
    "temporal": "temporal",
}
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
        configs = (args.one_frame_config, args.longer_config, args.temporal_config)
        version = version_of(common_data_set(configs, args.opts))
        tree = dataset_root() / folder_name(version)
        made = make_data(tree, args.train_videos, args.val_videos, version)
        print(f"{tree}: {'made' if made else 'already there'}")

    results: dict[str, dict[str, float]] = {}
    finals: dict[str, CfgNode] = {}
    weights = ""
    for name, config in zip(ROWS, configs, strict=True):
        results[name], finals[name] = train_stage(
            config,
            args.output / name,
            args.opts,
            weights=weights,
            resume=args.resume,
            # Those of equal training are shown side by side.
            save_predictions=bool(weights),
            step=timer.step,
        )
        # Both others start where the first one ends.
        weights = weights or finals[name].MODEL.WEIGHTS
    cfg = finals["temporal"]
    dataset = cfg.DATASETS.TEST[0]
    constant_class, baseline = constant_baseline(dataset, cfg.TEST.VC_WINDOWS)
    with timer.step("render"):
        titles = {
            f"{ROWS[name]}: {results[name]['mIoU']:.1f} mIoU": Path(final.TEST.SAVE_PREDICTIONS)
            for name, final in finals.items()
            if final.TEST.SAVE_PREDICTIONS
        }
        video, sheet = args.output / "demo.mp4", args.output / "contact_sheet.png"
        compare_videos(dataset, get_records(dataset)[: args.show_videos], titles, video, sheet)
    return {
        "dataset": dataset,
        "constant_class": constant_class,
        "results": {"constant": finite(baseline["sem_seg"]), **{name: finite(results[name]) for name in ROWS}},
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


def common_data_set(configs: Sequence[str], overrides: Sequence[str]) -> str:
    """The data set that all configs are evaluated on.

    Raises:
        ValueError: they name different ones, so their figures could not be compared.
    """
    names = {config: load_config(config, overrides).DATASETS.TEST[0] for config in configs}
    if len(set(names.values())) > 1:
        listed = ", ".join(f"{config}: {name}" for config, name in names.items())
        raise ValueError(
            f"the demo's configs are evaluated on different data sets ({listed}): "
            "choose --one-frame-config, --longer-config and --temporal-config of one data set"
        )
    return names[configs[0]]


def make_data(tree: Path, train_videos: int, val_videos: int, version: int) -> bool:
    """Make moving_shapes unless it exists with the same settings; returns whether it was made.

    Raises:
        ValueError: it exists with other settings.
    """
    try:
        return make_moving_shapes(tree, train_videos=train_videos, val_videos=val_videos, version=version)
    except FileExistsError as error:
        raise ValueError(
            f"{error} (datasets/make_moving_shapes.py --version {version} --force makes it anew)"
        ) from error


def finite(figures: dict[str, float]) -> dict[str, float | None]:
    """Figures rounded for JSON, which has no NaN."""
    return {name: None if math.isnan(value) else round(value, 4) for name, value in figures.items()}


def summary_text(summary: dict[str, Any]) -> str:
    """The tables that are printed at the end."""
    names = {"constant": f"constant prediction ({summary['constant_class']})", **ROWS}
    rows = [
        [names[key], *(percent(math.nan if figures.get(f) is None else figures[f] / 100) for f in FIGURES)]
        for key, figures in summary["results"].items()
    ]
    scores = tabulate(rows, [summary["dataset"], *FIGURES], disable_numparse=True, colalign=("left", *["right"] * 6))
    times = tabulate([[name, f"{seconds:.1f}"] for name, seconds in summary["seconds"].items()], ["step", "seconds"])
    files = "\n".join(f"{name}: {path}" for name, path in summary["files"].items())
    return f"{scores}\n\n{times}\n\n{files}"
