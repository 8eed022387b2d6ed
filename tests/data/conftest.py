"""A small VSPW tree on disk, and a config that reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import CfgNode
from tree_fixtures import write_frame

from the_mask.config import load_config
from the_mask.data import register_video_tree

CLASSES = ["sky", "road", "car"]
# PNG value 7 is sky, 8 road, 9 car, 0 void.
TABLE = [255, -1, -1, -1, -1, -1, -1, 0, 1, 2]


def random_frame(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and a mask of PNG values 0, 7, 8, 9 in coarse blobs."""
    blobs = rng.choice([0, 7, 8, 9], (height // 4 + 1, width // 4 + 1)).astype(np.uint8)
    mask = blobs.repeat(4, 0).repeat(4, 1)[:height, :width]
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), mask


@pytest.fixture
def make_tree(tmp_path: Path) -> Callable[..., str]:
    """``make_tree(name, {video: frames}, ...)`` writes and registers a tree and returns its name."""

    def make(name: str, videos: dict[str, int], size: tuple[int, int] = (24, 40), seed: int = 0, **kwargs) -> str:
        rng = np.random.default_rng(seed)
        root = tmp_path / name
        for video, length in videos.items():
            for t in range(length):
                write_frame(root / "data" / video, f"{t:03d}", *random_frame(rng, *size))
        root.mkdir(exist_ok=True)
        (root / "train.txt").write_text("".join(f"{video}\n" for video in videos))
        register_video_tree(name, root, "train", kwargs.pop("classes", CLASSES), kwargs.pop("table", TABLE), **kwargs)
        return name

    return make


@pytest.fixture
def clip_cfg() -> Callable[..., CfgNode]:
    """``clip_cfg(name, KEY, VALUE, ...)`` is a small config that trains and tests on one data set."""

    def make(name: str, *overrides) -> CfgNode:
        base: list[object] = ["DATASETS.TRAIN", (name,), "MODEL.SEM_SEG_HEAD.NUM_CLASSES", len(CLASSES), "SEED", 3]
        base += ["SOLVER.IMS_PER_BATCH", 4, "DATALOADER.NUM_WORKERS", 0, "INPUT.CLIP.DILATIONS", [-1]]
        base += ["INPUT.RESIZE.LONG_EDGE", 40, "INPUT.RESIZE.SHORT_EDGE", 24, "INPUT.CROP.SIZE", [20, 28]]
        return load_config(None, [str(word) for word in (*base, *overrides)])

    return make
