"""Ground truth of a data set, frame by frame, in the form of the test loader's clips but without pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detectron2.data import MetadataCatalog

from the_mask.data.io import read_label


def single_frame_clips(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each frame of the videos in time order, as a clip of one frame.

    Yields:
        ``dataset``, ``video_id``, ``frame_ids``, ``file_names``, ``frame_indices``, ``labels`` ([H, W] of train ids, or
        None), ``mask_file_name`` (or None), ``mask_file_names``, ``is_first``, ``is_last``.

    Raises:
        ValueError, FileNotFoundError: an unreadable mask, or illegal values in it; the message names the file.
    """
    for record in records:
        for index in range(len(record["frames"])):
            yield frame_clip(record, index)


def frame_clip(record: Mapping[str, Any], index: int) -> dict[str, Any]:
    """One frame of a video, see :func:`single_frame_clips`."""
    frame = record["frames"][index]
    mask = frame["sem_seg_file_name"]
    label_table = MetadataCatalog.get(record["dataset"]).label_table
    return {
        "dataset": record["dataset"],
        "video_id": record["video_id"],
        "frame_ids": [frame["frame_id"]],
        "file_names": [frame["file_name"]],
        "frame_indices": [index],
        "labels": [None if mask is None else read_label(mask, label_table)],
        "mask_file_name": mask,
        "mask_file_names": [mask],
        "is_first": index == 0,
        "is_last": index == len(record["frames"]) - 1,
    }
