"""Renders a report with Jinja2 from ``report.html.j2``; styles, script and pictures are inside the file."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

import the_mask
from the_mask.data.files import atomic_write
from the_mask.evaluation.html.collect import FrameNote, RunReport
from the_mask.evaluation.metrics import iou_from_confusion
from the_mask.evaluation.report import meaning

CURVE_WIDTH, CURVE_HEIGHT = 600, 90
# Cells of the confusion matrix below this share of their row are blank.
LEAST_SHARE = 0.005


def write_report(path: str | Path, runs: Sequence[RunReport]) -> Path:
    """Write a report; the other runs are compared with the first one.

    Args:
        path: the HTML file.
        runs: runs on the same data set.

    Raises:
        ValueError: no run, runs on several data sets, or two runs with the same name.
        ModuleNotFoundError: Jinja2 is not installed.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    if len({(run.dataset, tuple(run.class_names)) for run in runs}) > 1:
        raise ValueError(f"runs of several data sets: {', '.join(sorted({run.dataset for run in runs}))}")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"two runs have one name: {', '.join(names)}")
    try:
        from jinja2 import Environment, StrictUndefined
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a report needs Jinja2: pip install 'the_mask[report]'") from error
    # Names of data sets, classes and runs are untrusted text, so everything is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8"))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = template.render(
        runs=runs,
        version=the_mask.__version__,
        date=datetime.date.today().isoformat(),
        figures=_figures(runs),
        classes=_classes(runs),
        matrices=[_matrix(run) for run in runs],
        videos=_videos(runs),
        width=CURVE_WIDTH,
        height=CURVE_HEIGHT,
    )
    # Names of files need not be UTF-8.
    atomic_write(path, text.encode(errors="backslashreplace"))
    return path


def _figures(runs: Sequence[RunReport]) -> list[dict[str, Any]]:
    names = [name for name in runs[0].figures if not name.startswith("IoU-")]
    rows = []
    for name in names:
        values = [_number(run.figures.get(name, math.nan)) for run in runs]
        rows.append({"name": name, "meaning": meaning(name), "values": values, "changes": _changes(values)})
    return rows


def _changes(values: Sequence[float | None]) -> list[float | None]:
    """Differences from the first value."""
    return [None if value is None or values[0] is None else value - values[0] for value in values]


def _classes(runs: Sequence[RunReport]) -> list[dict[str, Any]]:
    reports = [iou_from_confusion(run.confusion) for run in runs]
    pixels = runs[0].confusion.sum(axis=1)
    total = max(int(pixels.sum()), 1)
    rows = []
    for index, name in enumerate(runs[0].class_names):
        values = [_number(100 * float(report["IoU"][index])) for report in reports]
        rows.append(
            {
                "name": name,
                "color": "#{:02x}{:02x}{:02x}".format(*runs[0].colors[index]),
                "support": 100 * int(pixels[index]) / total,
                "values": values,
                "changes": _changes(values),
            }
        )
    return rows


def _matrix(run: RunReport) -> list[dict[str, Any]]:
    rows = []
    for index, counts in enumerate(run.confusion):
        total = int(counts.sum())
        shares = counts / total if total else np.zeros(len(counts))
        rows.append(
            {
                "name": run.class_names[index],
                "cells": [float(share) if share >= LEAST_SHARE else None for share in shares],
                "empty": not total,
            }
        )
    return rows


def _videos(runs: Sequence[RunReport]) -> list[dict[str, Any]]:
    rows = []
    for video, notes in runs[0].curves.items():
        own = [run.per_video.get(video) for run in runs]
        values = [None if counts is None else _number(100 * iou_from_confusion(counts)["mIoU"]) for counts in own]
        curves = [run.curves.get(video, []) for run in runs]
        top = max((note.flicker or 0.0 for curve in curves for note in curve), default=0.0)
        rows.append(
            {
                "name": video,
                "frames": len(notes),
                "values": values,
                "iou": [_line(curve, "miou", 1.0) for curve in curves],
                "flicker": [_line(curve, "flicker", top or 1.0) for curve in curves],
                "most_flicker": 100 * top,
            }
        )
    return rows


def _line(notes: Sequence[FrameNote], name: str, top: float) -> list[str]:
    """Points of SVG polylines; frames without a value split the line."""
    step = CURVE_WIDTH / max(len(notes) - 1, 1)
    lines: list[list[str]] = [[]]
    for number, note in enumerate(notes):
        value = getattr(note, name)
        if value is None:
            lines.append([])
        else:
            lines[-1].append(f"{number * step:.1f},{CURVE_HEIGHT * (1 - value / top):.1f}")
    return [" ".join(line) for line in lines if line]


def _number(value: float) -> float | None:
    return None if value != value else float(value)
