"""Scores label maps on disk, written by any program.

Expected tree: ``<pred_dir>/<video>/<frame>.png``, one per frame of the data set, one channel, original frame size.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from numpy.typing import NDArray
from tqdm import tqdm

from the_mask.data import get_records
from the_mask.data.files import inside
from the_mask.data.io import apply_label_table, read_label_raw
from the_mask.data.video_tree import Record
from the_mask.evaluation.evaluator import VideoSemSegEvaluator
from the_mask.evaluation.frames import single_frame_clips
from the_mask.evaluation.loop import Predicted, feed
from the_mask.evaluation.metrics import check_labels
from the_mask.evaluation.temporal_consistency import FlowFunction
from the_mask.inference.sinks import Sink

logger = logging.getLogger(__name__)


class PredictionErrors(ValueError):
    """Problems with a folder of predictions; :attr:`problems` has one line per file, for all of them."""

    def __init__(self, folder: Path, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__(
            f"{len(self.problems)} problems with the predictions in {folder}:\n" + "\n".join(self.problems)
        )


def evaluate_predictions(
    pred_dir: str | Path,
    dataset_name: str,
    *,
    train_ids: bool = False,
    windows: Sequence[int] = (8, 16),
    flow: FlowFunction | None = None,
    tc_videos: int = 0,
    progress: bool = True,
    sinks: Sequence[Sink] = (),
) -> OrderedDict[str, dict[str, float]]:
    """Score ``<pred_dir>/<video>/<frame>.png`` against a registered data set.

    Args:
        pred_dir: folder of predictions.
        dataset_name: name of the data set; frames without ground truth are not scored, but their prediction must exist.
        train_ids: the PNGs hold train ids 0..K-1; otherwise the data set's raw values (VSPW: 1..124). In both cases the
            ignored value is allowed only where the ground truth is ignored, too: every labelled pixel needs a class.
        windows, flow: as for :class:`VideoSemSegEvaluator`.
        tc_videos: compute TC on the first N videos; 0 takes all.
        progress: show a bar on the terminal.
        sinks: further consumers of the predictions.

    Returns:
        As :meth:`VideoSemSegEvaluator.evaluate`.

    Raises:
        FileNotFoundError: no such folder.
        PredictionErrors: missing files; or, if none is missing, unreadable files, wrong sizes and illegal values. All
            are listed.
        ValueError: the data set has no ground truth.
    """
    folder = Path(pred_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder of predictions {folder} does not exist; expected {folder}/<video>/<frame>.png")
    records = get_records(dataset_name)
    if not any(frame["sem_seg_file_name"] for record in records for frame in record["frames"]):
        raise ValueError(f"data set {dataset_name} has no ground truth to score against")
    wanted = [
        inside(folder, record["video_id"], f"{frame['frame_id']}.png")
        for record in records
        for frame in record["frames"]
    ]
    missing = [f"{path}: missing" for path in wanted if not path.is_file()]
    if missing:
        raise PredictionErrors(folder, missing)
    extra = len(set(folder.rglob("*.png")) - set(wanted))
    if extra:
        logger.warning(f"{folder} holds {extra} PNGs that belong to no frame of {dataset_name}; they are not scored")

    evaluator = VideoSemSegEvaluator(
        dataset_name,
        windows=windows,
        flow=flow,
        tc_videos={record["video_id"] for record in records[:tc_videos]} if tc_videos else None,
    )
    problems: list[str] = []
    with tqdm(total=len(wanted), unit="frame", disable=None if progress else True) as bar:
        feed(_stored_predictions(records, wanted, train_ids, problems, bar), [evaluator, *sinks])
    if problems:
        raise PredictionErrors(folder, problems)
    return evaluator.evaluate(expected_frames=len(wanted))


def _stored_predictions(
    records: Sequence[Record], paths: Sequence[Path], train_ids: bool, problems: list[str], bar: Any
) -> Iterator[Predicted]:
    """The frames of some videos with label maps read from files; after the first problem, only collect problems."""
    for clip, path in zip(single_frame_clips(records), paths, strict=True):
        metadata = MetadataCatalog.get(clip.dataset)
        try:
            labels = _read_prediction(path, metadata, train_ids)
            _check_against_truth(labels, clip.labels[0], metadata.ignore_label, path)
        except ValueError as error:
            problems.append(str(error))
        if not problems:
            yield [clip], [[labels]]
        bar.update()


def _read_prediction(path: Path, metadata: Any, train_ids: bool) -> NDArray[np.integer]:
    """Read a prediction as train ids or the ignore label, [H, W]."""
    raw = read_label_raw(path)
    if not train_ids:
        return apply_label_table(raw, metadata.label_table, path)
    check_labels(
        raw,
        len(metadata.stuff_classes),
        "prediction (read as train ids)",
        str(path),
        ignore_label=metadata.ignore_label,
    )
    return raw


def _check_against_truth(
    labels: NDArray[np.integer], truth: NDArray[np.integer] | None, ignore_label: int, path: Path
) -> None:
    """Raise ValueError if the size differs from the ground truth's, or a labelled pixel has no class."""
    if truth is None:
        return
    if truth.shape != labels.shape:
        raise ValueError(f"{path} has size {labels.shape}, its ground truth {truth.shape} (height, width)")
    unanswered = int(np.count_nonzero((labels == ignore_label) & (truth != ignore_label)))
    if unanswered:
        raise ValueError(f"{path} says ignored for {unanswered} pixels whose ground truth has a class")
