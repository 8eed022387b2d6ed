"""Predictions of a whole data set as a folder of PNGs, ``<folder>/<video>/<frame>.png``: what test servers take."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch import nn

from the_mask.data import ClipMapper, get_records, tile_video
from the_mask.data.class_names import check_classes
from the_mask.data.files import inside
from the_mask.data.samplers import shard_videos
from the_mask.data.video_tree import Record
from the_mask.evaluation.claims import claim_folder, make_claim
from the_mask.evaluation.label_png import raw_values_of_classes, save_label_map
from the_mask.evaluation.metrics import as_label_array
from the_mask.evaluation.runner import ProgressMeter, evaluation_mode, make_stream, stream_videos, unwrap
from the_mask.inference.compose import build_stream, is_plain, must_stream
from the_mask.inference.saved_scores import score_path

logger = logging.getLogger(__name__)
VALUES = ("train-ids", "raw")


def predict_dataset(
    cfg: CfgNode, model: nn.Module, dataset_name: str, folder: str | Path, values: str = "train-ids"
) -> int:
    """Write the label maps of every frame of a data set; a collective call when there are several processes.

    Resumable: a video all of whose files exist is left out, one that was interrupted starts anew (its streams need
    their first frames), and a file appears whole or not at all. Ground truth is not needed.

    Args:
        cfg: keys ``TEST.*`` and ``INPUT.TEST.*``, as in an evaluation.
        model: the config's segmentor; put in eval mode meanwhile.
        dataset_name: registered data set.
        folder: where the PNGs go, one channel, original frame size.
        values: "train-ids" writes classes 0..K-1, as the VSPW challenge takes them; "raw" the data set's own values
            (VSPW: class + 1), as ``tools/evaluate_predictions.py`` reads them by default.

    Returns:
        Number of frames that were predicted now, by this process.

    Raises:
        ValueError: unknown ``values``; the folder holds predictions of other weights, frames, config or kind of values.
    """
    if values not in VALUES:
        raise ValueError(f"values {values!r}: expected one of {', '.join(VALUES)}")
    check_classes(cfg, [dataset_name])
    folder = Path(folder)
    plain, records = unwrap(model), get_records(dataset_name)
    scores = Path(cfg.TEST.SAVE_SCORES) if cfg.TEST.SAVE_SCORES else None
    claim = make_claim(cfg, plain, dataset_name, records, values)
    claim_folder(folder, claim)
    if scores is not None:
        # Scores do not depend on the values of the PNGs.
        claim_folder(scores, {key: text for key, text in claim.items() if key != "values"}, ".npz")
    metadata = MetadataCatalog.get(dataset_name)
    classes = len(metadata.stuff_classes)
    table = list(range(classes)) if values == "train-ids" else raw_values_of_classes(metadata.label_table, classes)

    open_records = [record for record in records if not _is_done(record, folder, scores)]
    shard = shard_videos([len(record["frames"]) for record in open_records], comm.get_world_size())[comm.get_rank()]
    mine = [open_records[i] for i in shard]
    logger.info(f"{dataset_name}: {len(records) - len(open_records)} of {len(records)} videos are there already")
    meter = ProgressMeter(dataset_name, sum(len(record["frames"]) for record in mine))
    with evaluation_mode(plain), torch.no_grad(), meter:
        for clip, maps in _predictions(cfg, plain, dataset_name, mine, meter):
            for frame_id, labels in zip(clip["frame_ids"], maps, strict=True):
                path = inside(folder, clip["video_id"], f"{frame_id}.png")
                save_label_map(path, as_label_array(labels), table)
                meter.update(1)
    comm.synchronize()
    return meter.frames


def _is_done(record: Record, folder: Path, scores: Path | None) -> bool:
    names = [(record["video_id"], frame["frame_id"]) for frame in record["frames"]]
    done = all((folder / video / f"{frame}.png").is_file() for video, frame in names)
    return done and (scores is None or all(score_path(scores, name).is_file() for name in names))


def _predictions(
    cfg: CfgNode, model: Any, dataset_name: str, records: Sequence[Record], meter: ProgressMeter
) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Clips with their label maps, as an evaluation would make them."""
    if must_stream(cfg):
        for clips, maps in stream_videos(make_stream(cfg, model, dataset_name), _unlabelled(records), meter):
            yield clips[0], maps[0]
        return
    mapper = ClipMapper.from_config(cfg, False, [dataset_name])
    classes = MetadataCatalog.get(dataset_name).stuff_classes
    predictor = model if is_plain(cfg) else build_stream(cfg, model, classes)
    for record in _unlabelled(records):
        tiling = tile_video(len(record["frames"]), cfg.TEST.CLIP_LENGTH, cfg.TEST.CLIP_STRIDE)
        for number, indices in enumerate(tiling):
            clip = mapper.test_clip(record, indices, number == 0, number == len(tiling) - 1)
            with meter.model_time():
                maps = predictor.predict([clip])
            yield clip, maps[0]


def _unlabelled(records: Sequence[Record]) -> list[Record]:
    """The records without their ground truth, which a prediction does not read."""
    return [
        {**record, "frames": [{**frame, "sem_seg_file_name": None} for frame in record["frames"]]} for record in records
    ]
