"""The data sets known by name, one file each. They live under ``$DETECTRON2_DATASETS`` (default ``./datasets``)."""

from __future__ import annotations

import os
from pathlib import Path

from the_mask.data.datasets.camvid import register_camvid
from the_mask.data.datasets.moving_shapes import register_moving_shapes
from the_mask.data.datasets.vspw import register_vspw


def dataset_root() -> Path:
    """``$DETECTRON2_DATASETS``, or ``./datasets``."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()


def register_all(root: str | Path | None = None) -> None:
    """Register every data set under ``root``; calling it again with another root moves them all.

    Args:
        root: folder that holds ``VSPW_480p``, ``camvid``, ``moving_shapes``; ``None`` means :func:`dataset_root`.
    """
    root = dataset_root() if root is None else Path(root)
    register_vspw(root / "VSPW_480p")
    register_camvid(root / "camvid")
    register_moving_shapes(root / "moving_shapes")


__all__ = ["dataset_root", "register_all", "register_camvid", "register_moving_shapes", "register_vspw"]
