"""A stream's networks in the runtime that a user names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from the_mask.inference.runtimes.choose import RuntimeReport, use_runtime
from the_mask.inference.runtimes.quantize import calibration_clips
from the_mask.inference.views import MultiView


def prepare_stream(
    segmentor: MultiView,
    backend: str = "eager",
    precision: str = "float32",
    calibrate: str | Path | None = None,
    classes: Sequence[str] = (),
    size: tuple[int, int] | None = None,
) -> RuntimeReport | None:
    """Let the networks of a stream run elsewhere, or faster; changes its model in place.

    Args:
        segmentor: a stream of pictures.
        backend, precision: see :func:`use_runtime`.
        calibrate: for int8, a video file or a folder of frames like those to come.
        classes: names, for the report.
        size: (height, width) of the frames to come, if known: int8 is calibrated for it, whatever size the calibration
            frames have.

    Returns:
        What runs where; None for PyTorch as it is.

    Raises:
        ValueError, ModuleNotFoundError: see :func:`use_runtime`; or frames for a precision that needs none.
        FileNotFoundError: no such video or folder.
    """
    if calibrate is not None and precision != "int8":
        raise ValueError(f"calibration frames ({calibrate}) are for precision int8, not {precision}")
    if (backend, precision) == ("eager", "float32"):
        return None
    clips = None if calibrate is None else calibration_clips(segmentor, calibrate, size)
    report = use_runtime(segmentor.model, backend, precision, calibration=clips)
    report.classes = classes
    return report
