"""The data sets known by name, one file each. They live under ``$DETECTRON2_DATASETS`` (default ``./datasets``)."""

from __future__ import annotations

import os
from pathlib import Path

from the_mask.data.datasets.ade20k import register_ade20k
from the_mask.data.datasets.camvid import register_camvid
from the_mask.data.datasets.cityscapes import register_cityscapes
from the_mask.data.datasets.coco_stuff import register_coco_stuff
from the_mask.data.datasets.moving_shapes import register_moving_shapes
from the_mask.data.datasets.vspw import register_vspw


def dataset_root() -> Path:
    """``$DETECTRON2_DATASETS``, or ``./datasets``."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()


def register_all(root: str | Path | None = None) -> None:
    """Register every known data set under ``root``; another call with another root moves them all.

    Args:
        root: folder that holds ``VSPW_480p``, ``camvid``, ``moving_shapes``, ``moving_shapes_v3``, ``coco_stuff164k``,
            ``ADEChallengeData2016``, ``cityscapes``; ``None`` means :func:`dataset_root`.
    """
    root = dataset_root() if root is None else Path(root)
    register_vspw(root / "VSPW_480p")
    register_camvid(root / "camvid")
    register_moving_shapes(root / "moving_shapes")
    register_moving_shapes(root / "moving_shapes_v3", version=3)
    register_coco_stuff(root / "coco_stuff164k")
    register_ade20k(root / "ADEChallengeData2016")
    register_cityscapes(root / "cityscapes")


__all__ = [
    "dataset_root",
    "register_ade20k",
    "register_all",
    "register_camvid",
    "register_cityscapes",
    "register_coco_stuff",
    "register_moving_shapes",
    "register_vspw",
]
