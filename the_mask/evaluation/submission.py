"""Predictions of a whole data set as a folder of PNGs, ``<folder>/<video>/<frame>.png``, for test servers."""

from __future__ import annotations

import logging
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch import nn

from the_mask.data import get_records
from the_mask.data.class_names import check_classes
from the_mask.data.label_maps import raw_values_of_classes
from the_mask.data.video_tree import Record
from the_mask.evaluation.claims import alone_in, claim_folder, make_claim
from the_mask.evaluation.loop import predict_videos, unlabelled, unwrap
from the_mask.inference.saved_scores import score_path
from the_mask.inference.sinks import LabelFolder

logger = logging.getLogger(__name__)
VALUES = ("train-ids", "raw")


def predict_dataset(
    cfg: CfgNode, model: nn.Module, dataset_name: str, folder: str | Path, values: str = "train-ids"
) -> int:
    """Write the label maps of every frame of a data set; a collective call if there are several processes.

    Resumable: a video is skipped if all of its files exist; an interrupted one restarts (its stream needs its first
    frames). Files are written atomically. Ground truth is not needed.

    Args:
        cfg: keys ``TEST.*`` and ``INPUT.TEST.*``, as in an evaluation.
        model: the config's segmentor; put in eval mode during the call.
        dataset_name: registered data set.
        folder: output folder of the PNGs, one channel, original frame size.
        values: "train-ids" writes classes 0..K-1, as the VSPW challenge takes them; "raw" the data set's own values
            (VSPW: class + 1), as ``tools/evaluate_predictions.py`` reads them by default.

    Returns:
        Number of frames predicted in this call, by this process.

    Raises:
        ValueError: unknown ``values``, or the folder has predictions of other weights, frames, config or ``values``,
            or another run is writing there.
    """
    if values not in VALUES:
        raise ValueError(f"values {values!r}: expected one of {', '.join(VALUES)}")
    check_classes(cfg, [dataset_name])
    scores = Path(cfg.TEST.SAVE_SCORES) if cfg.TEST.SAVE_SCORES else None
    with alone_in(Path(folder), scores):
        return _predict(cfg, model, dataset_name, Path(folder), scores, values)


def _predict(cfg: CfgNode, model: nn.Module, dataset_name: str, folder: Path, scores: Path | None, values: str) -> int:
    plain, records = unwrap(model), get_records(dataset_name)
    claim = make_claim(cfg, plain, dataset_name, records, values)
    claim_folder(folder, claim)
    if scores is not None:
        # Scores do not depend on ``values``.
        claim_folder(scores, {key: text for key, text in claim.items() if key != "values"}, ".npz")
    metadata = MetadataCatalog.get(dataset_name)
    classes = len(metadata.stuff_classes)
    table = list(range(classes)) if values == "train-ids" else raw_values_of_classes(metadata.label_table, classes)

    open_records = [record for record in records if not _is_done(record, folder, scores)]
    logger.info(f"{dataset_name}: {len(records) - len(open_records)} of {len(records)} videos are there already")
    frames = predict_videos(cfg, plain, dataset_name, unlabelled(open_records), [LabelFolder(folder, table)])
    comm.synchronize()
    return frames


def _is_done(record: Record, folder: Path, scores: Path | None) -> bool:
    names = [(record["video_id"], frame["frame_id"]) for frame in record["frames"]]
    done = all((folder / video / f"{frame}.png").is_file() for video, frame in names)
    return done and (scores is None or all(score_path(scores, name).is_file() for name in names))
