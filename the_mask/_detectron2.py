"""Chooses between an installed Detectron2 and the embedded runtime, once, when ``the_mask`` is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

RUNTIME = Path(__file__).resolve().parent / "runtime"
MODES = ("auto", "real", "embedded")


def select_detectron2(mode: str | None = None) -> None:
    """Put the embedded runtime on ``sys.path``: last for ``auto``, first for ``embedded``, not at all for ``real``.

    Appending is enough for ``auto``: an installed package comes earlier on the path and wins; also in worker processes,
    because multiprocessing passes the path on.

    Args:
        mode: one of :data:`MODES`; ``None`` reads the environment variable ``THE_MASK_D2``.

    Raises:
        ValueError: unknown mode.
    """
    mode = mode or os.environ.get("THE_MASK_D2") or "auto"
    if mode not in MODES:
        raise ValueError(f"THE_MASK_D2={mode}: expected one of {', '.join(MODES)}")
    if "detectron2" in sys.modules or mode == "real" or str(RUNTIME) in sys.path:
        return
    if mode == "embedded":
        sys.path.insert(0, str(RUNTIME))
    else:
        sys.path.append(str(RUNTIME))
