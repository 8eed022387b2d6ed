"""Masks from an earlier run, read together with the frames they belong to. Axes: H W pixels of the source frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from the_mask.data.classes import ExplainValues
from the_mask.data.files import inside
from the_mask.data.io import read_label


def prior_mask_path(folder: str | Path, video_id: str, frame_id: str) -> Path:
    """Path of the mask that ``TEST.SAVE_PREDICTIONS`` and ``TEST.STAGES`` write for a frame."""
    return inside(folder, video_id, f"{frame_id}.png")


def read_prior_mask(
    folder: str | Path,
    video_id: str,
    frame_id: str,
    size: tuple[int, int],
    label_table: Sequence[int],
    explain_values: ExplainValues | None = None,
) -> np.ndarray:
    """Read a stored mask as train ids [H, W].

    Args:
        folder: holds ``<video>/<frame>.png`` with raw label values.
        video_id, frame_id: of the frame.
        size: (H, W) of the frame.
        label_table: raw PNG value -> train id.
        explain_values: see :class:`the_mask.data.classes.ClassList`.

    Raises:
        FileNotFoundError: no such mask.
        ValueError: unreadable, of another size than the frame, or with values of another class list.
    """
    path = prior_mask_path(folder, video_id, frame_id)
    if not path.is_file():
        raise FileNotFoundError(
            f"prior mask {path} does not exist: predict every frame first, with TEST.SAVE_PREDICTIONS {folder}"
        )
    mask = read_label(path, label_table, explain_values)
    if mask.shape != tuple(size):
        raise ValueError(
            f"prior mask {path} is {mask.shape[0]}x{mask.shape[1]} (height x width), its frame {size[0]}x{size[1]}: "
            "predict it again at the frame's size"
        )
    return mask
