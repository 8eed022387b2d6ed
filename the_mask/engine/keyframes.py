"""Keyframe evaluation, as run by ``the-mask evaluate-keyframes``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from tabulate import tabulate

from the_mask.data import get_records
from the_mask.data.augmentation import fit_size, round_up
from the_mask.data.files import write_json
from the_mask.data.io import read_image
from the_mask.engine.run import RunOptions, check
from the_mask.engine.setup import setup
from the_mask.evaluation.keyframe import average_macs, evaluate_keyframes, propagation_macs
from the_mask.modeling.propagation.propagated import PropagatedSegmentor
from the_mask.weights.trained import trained


def run_keyframe_evaluation(options: RunOptions, distances: int, json_file: Path | None = None) -> dict[str, Any]:
    """Evaluate ``MODEL.WEIGHTS`` on ``DATASETS.TEST`` at every distance, count operations, print a table.

    Args:
        options: options with a config of META_ARCHITECTURE PropagatedSegmentor.
        distances: L; intervals 1 ... L are tabulated: interval l averages the distances below l.
        json_file: output file for the figures by data set.

    Returns:
        By data set: the figures of :func:`evaluate_keyframes`, ``intervals`` (one row each), ``size`` (H, W).

    Raises:
        ValueError, FileNotFoundError: bad config, weights or data.
    """
    if distances < 1:
        raise ValueError(f"--distances {distances}: expected at least 1")
    cfg = check(options, comm.get_world_size())
    setup(cfg)
    model = trained(cfg, trust_pickle=options.trust_pickle)
    results = {}
    for name in cfg.DATASETS.TEST:
        with torch.no_grad():
            figures: dict[str, Any] = dict(evaluate_keyframes(cfg, model, name, distances))
        assert isinstance(model, PropagatedSegmentor)
        image = read_image(get_records(name)[0]["frames"][0]["file_name"])
        box = (cfg.INPUT.TEST.LONG_EDGE, cfg.INPUT.TEST.SHORT_EDGE)
        size = round_up(fit_size(image.shape[0], image.shape[1], box), cfg.INPUT.TEST.SIZE_MULTIPLE)
        key, non_key = propagation_macs(model, size)
        rows = [
            {
                "interval": interval,
                "mIoU": sum(figures[f"mIoU_{i}"] for i in range(interval)) / interval,
                "mIoU_min": figures[f"mIoU_{interval - 1}"],
                "GMACs": average_macs(key, non_key, interval) / 1e9,
            }
            for interval in range(1, distances + 1)
        ]
        figures.update(intervals=rows, size=list(size), key_gmacs=key / 1e9, non_key_gmacs=non_key / 1e9)
        results[name] = figures
        print(f"{name}, {size[0]}x{size[1]}: segmentor alone {figures['mIoU_segmentor']:.2f} mIoU")
        print(tabulate(rows, headers="keys", floatfmt=("d", ".2f", ".2f", ".3f")))
    if json_file is not None:
        write_json(json_file, results)
    return results
