"""``the_mask.load``: loads a trained model by name, ready for frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from the_mask.inference.stream import StreamingSegmentor
from the_mask.weights.find import find_model as find_model

# As libraries with a hub call it; it has the options of hub models.
from_pretrained = StreamingSegmentor.from_pretrained


def load(
    name_or_path: str | Path,
    backend: str = "auto",
    overrides: Sequence[str] = (),
    precision: str = "float32",
    calibrate: str | Path | None = None,
) -> StreamingSegmentor:
    """Load a trained model, ready for the frames of a video::

        segmentor = the_mask.load("street-live")
        state = segmentor.init_state()
        labels, state = segmentor.step(frame, state)  # frame: uint8 RGB [H, W, 3]; labels: [H, W]

    Args:
        name_or_path: see :func:`find_model`.
        backend: what runs its networks on a CPU: "eager" is PyTorch, "auto" the fastest that is installed, measured
            when a size is first seen; see :func:`the_mask.inference.runtimes.use_runtime`.
        overrides: flat list ``[KEY, VALUE, ...]`` of config keys, e.g. ``["MODEL.DEVICE", "cpu"]``.
        precision: of the networks on a CPU.
        calibrate: for precision int8, a video file or a folder of frames like those to come.

    Raises:
        ValueError: an unknown name (with the nearest ones), a damaged file, a config without weights.
        FileNotFoundError: no such config file, folder, weights or hub model.
        ModuleNotFoundError: a hub model without huggingface_hub.
    """
    return from_pretrained(name_or_path, backend=backend, overrides=overrides, precision=precision, calibrate=calibrate)
