"""Writing data sets of videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_frame(video: Path, stem: str, picture: np.ndarray, labels: np.ndarray | None) -> None:
    """One frame of a video folder, without loss: origin/STEM.png [H, W(, 3)] and mask/STEM.png [H, W], of 0..255."""
    for kind, pixels in (("origin", picture), ("mask", labels)):
        (video / kind).mkdir(parents=True, exist_ok=True)
        if pixels is not None:
            Image.fromarray(pixels.astype(np.uint8)).save(video / kind / f"{stem}.png")
