"""Ground truth of a data set, frame by frame, in the form of the test loader's clips but without pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from detectron2.data import MetadataCatalog

from the_mask.data.clips import Clip
from the_mask.data.io import read_label
from the_mask.data.registry import Record


def single_frame_clips(records: Sequence[Record]) -> Iterator[Clip]:
    """Each frame of the videos in time order, as a clip of one frame, whose labels are an array [H, W] or None.

    Raises:
        ValueError, FileNotFoundError: an unreadable mask, or illegal values in it; the message names the file.
    """
    for record in records:
        for index in range(len(record["frames"])):
            yield frame_clip(record, index)


def frame_clip(record: Record, index: int) -> Clip:
    """One frame of a video, see :func:`single_frame_clips`."""
    frame = record["frames"][index]
    mask = frame["sem_seg_file_name"]
    label_table = MetadataCatalog.get(record["dataset"]).label_table
    return Clip(
        dataset=record["dataset"],
        video_id=record["video_id"],
        frame_ids=[frame["frame_id"]],
        file_names=[frame["file_name"]],
        frame_indices=[index],
        labels=[None if mask is None else read_label(mask, label_table)],
        mask_file_names=[mask],
        is_first=index == 0,
        is_last=index == len(record["frames"]) - 1,
    )
