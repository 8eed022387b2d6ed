#!/usr/bin/env python
"""Accuracy against speed of the street models and their peers, drawn from benchmarks/results/street_cpu.json.

benchmarks/plot_street.py --output docs/images/street.png
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS
from PIL import Image, ImageDraw, ImageFont

from the_mask.data.files import atomic_write
from the_mask.engine import exit_code

WIDTH, HEIGHT = 1120, 640
LEFT, RIGHT, TOP, BOTTOM = 90, 40, 70, 80
INK, FAINT, OURS, PEER = (30, 30, 30), (215, 215, 215), (200, 60, 40), (70, 100, 170)


@dataclass(frozen=True)
class Axes:
    """Frames per second, logarithmic, to the right; mIoU upwards.

    Attributes:
        speeds, scores: lowest and highest of each.
    """

    speeds: tuple[float, float]
    scores: tuple[float, float]

    @classmethod
    def around(cls, rows: Sequence[dict[str, Any]]) -> Axes:
        """Axes with a margin around the data."""
        speeds, scores = ([row[name] for row in rows] for name in ("fps", "mIoU"))
        return cls((min(speeds) / 1.35, max(speeds) * 1.6), (math.floor(min(scores) - 1), math.ceil(max(scores) + 1)))

    def place(self, speed: float, score: float) -> tuple[float, float]:
        """Pixel of a point."""
        low, high = map(math.log, self.speeds)
        x = LEFT + (math.log(speed) - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - (score - self.scores[0]) / (self.scores[1] - self.scores[0]) * (
            HEIGHT - TOP - BOTTOM
        )


def draw(report: dict[str, Any]) -> Image.Image:
    """The plot of a report ``{"title", "rows": [{"model", "mIoU", "fps", "ours", "series"}, ...]}``.

    Rows with the same ``series`` are connected: one model at several settings.

    Raises:
        ValueError: no row has both figures.
    """
    rows = [row for row in report["rows"] if row.get("fps") and row.get("mIoU")]
    if not rows:
        raise ValueError("no row has both mIoU and fps")
    axes = Axes.around(rows)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    text, small = ImageFont.load_default(22), ImageFont.load_default(18)
    pen.text((WIDTH / 2, TOP / 2), report["title"], INK, text, anchor="mm")
    step = 2 if axes.scores[1] - axes.scores[0] <= 16 else 5
    for score in range(math.ceil(axes.scores[0] / step) * step, int(axes.scores[1]) + 1, step):
        _, y = axes.place(axes.speeds[0], score)
        pen.line((LEFT, y, WIDTH - RIGHT, y), FAINT)
        pen.text((LEFT - 12, y), str(score), INK, small, anchor="rm")
    for speed in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100):
        if axes.speeds[0] <= speed <= axes.speeds[1]:
            x, bottom = axes.place(speed, axes.scores[0])
            pen.line((x, TOP, x, bottom), FAINT)
            pen.text((x, bottom + 18), str(speed), INK, small, anchor="mm")
    pen.text((WIDTH / 2, HEIGHT - 24), report["x_axis"], INK, text, anchor="mm")
    pen.text((LEFT - 70, TOP - 22), "mIoU", INK, text, anchor="lm")
    for series in dict.fromkeys(row["series"] for row in rows if row.get("series")):
        points = [axes.place(row["fps"], row["mIoU"]) for row in rows if row.get("series") == series]
        pen.line([value for point in sorted(points) for value in point], OURS, 3)
    for row in rows:
        x, y = axes.place(row["fps"], row["mIoU"])
        pen.ellipse((x - 7, y - 7, x + 7, y + 7), OURS if row["ours"] else PEER)
        offset, anchor = (-14, "rm") if row.get("label") == "left" else (14, "lm")
        pen.text((x + offset, y - 12), row["model"], INK, small, anchor=anchor)
    return image


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "street_cpu.json", metavar="JSON")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG")
    args = parser.parse_args(arguments)

    def run() -> None:
        image = draw(json.loads(args.results.read_text(encoding="utf-8")))
        atomic_write(args.output, lambda stream: image.save(stream, format="PNG"))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
