"""Runs a trained model on a data set without scoring: predictions as PNGs, and fitting a temperature."""

from __future__ import annotations

import logging
from pathlib import Path

from detectron2.data import MetadataCatalog

from the_mask.data import get_records
from the_mask.data.class_names import check_classes
from the_mask.engine.run import RunOptions
from the_mask.engine.setup import setup
from the_mask.evaluation.calibration import Calibration, fit_temperature, sample_pixels
from the_mask.evaluation.submission import predict_dataset
from the_mask.inference.compose import build_score_stream
from the_mask.weights.trained import trained

logger = logging.getLogger(__name__)


def run_prediction(options: RunOptions, dataset_name: str, folder: str | Path, values: str = "train-ids") -> int:
    """Build the options' model and write its predictions; see :func:`predict_dataset`.

    Returns:
        Number of frames predicted by this process.
    """
    cfg = options.load()
    setup(cfg)
    model = trained(cfg, datasets=[dataset_name], trust_pickle=options.trust_pickle)
    frames = predict_dataset(cfg, model, dataset_name, folder, values)
    logger.info("%s: %d frames written", folder, frames)
    return frames


def run_calibration(options: RunOptions, dataset_name: str, per_frame: int = 500, max_videos: int = 0) -> Calibration:
    """Fit the temperature of the options' model, with its windows and views, on a labelled data set.

    Args:
        options: config and overrides.
        dataset_name: registered data set; not the one on which the ensemble is evaluated.
        per_frame: number of pixels drawn from a frame.
        max_videos: use only the first N videos; 0 takes all.
    """
    cfg = options.load()
    setup(cfg)
    check_classes(cfg, [dataset_name])
    stream = build_score_stream(cfg, trained(cfg, datasets=[dataset_name], trust_pickle=options.trust_pickle))
    records = get_records(dataset_name)
    records = records[:max_videos] if max_videos else records
    return fit_temperature(*sample_pixels(stream, records, MetadataCatalog.get(dataset_name).ignore_label, per_frame))
