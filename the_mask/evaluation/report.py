"""Results as text tables: one line per figure, one row per class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from the_mask.evaluation.metrics import IoUReport

# Description of each figure, as in docs/metrics.md.
MEANINGS = {
    "mIoU": "mean IoU over classes with ground truth",
    "mIoU_union": "mean IoU over classes with ground truth or predictions (non-zero union)",
    "fwIoU": "IoU weighted by class frequency",
    "pACC": "pixel accuracy",
    "mACC": "mean class accuracy (recall)",
    "BIoU": "boundary IoU: mean IoU over classes, of the pixels near a class border",
    "TC": "temporal consistency: agreement with the next prediction along the optical flow",
    "TC_compat": "temporal consistency as VSPW's script warps",
}


def meaning(name: str) -> str:
    """A short description of a figure such as ``mIoU``, ``VC8`` or ``VC16_compat``."""
    if name in MEANINGS:
        return MEANINGS[name]
    if name.startswith("VC"):
        window, _, mode = name[2:].partition("_")
        if mode:
            script = "CFFM's" if mode == "compat" else "VSPW's"
            return f"share of pixels still for {window} frames whose prediction is constant ({script} script)"
        return f"share of pixels still for {window} frames predicted correctly in all of them"
    return ""


def class_table(report: IoUReport, class_names: Sequence[str]) -> str:
    """IoU, accuracy (recall) and pixel shares of every class in percent; a dash where the denominator is 0."""
    total_gt, total_pred = int(report["gt_pixels"].sum()), int(report["pred_pixels"].sum())
    rows = [
        [
            index,
            name,
            percent(float(report["IoU"][index])),
            percent(float(report["ACC"][index])),
            percent(int(report["gt_pixels"][index]) / total_gt if total_gt else math.nan),
            percent(int(report["pred_pixels"][index]) / total_pred if total_pred else math.nan),
        ]
        for index, name in enumerate(class_names)
    ]
    headers = ["id", "class", "IoU", "recall", "% of ground truth", "% of predictions"]
    return tabulate(rows, headers, tablefmt="simple", disable_numparse=True, colalign=("right", "left", *["right"] * 4))


def summary_table(results: Mapping[str, float]) -> str:
    """The pooled figures of ``results`` (percent), without the per-class ones, each with its meaning."""
    rows = [
        [name, percent(value / 100), meaning(name)] for name, value in results.items() if not name.startswith("IoU-")
    ]
    return tabulate(rows, ["figure", "%", "meaning"], disable_numparse=True, colalign=("left", "right", "left"))


def percent(fraction: float) -> str:
    """``0.4056`` -> ``40.56``; NaN -> ``-``."""
    return "-" if math.isnan(fraction) else f"{100 * fraction:.2f}"
