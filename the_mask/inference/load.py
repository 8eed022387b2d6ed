"""``the_mask.load``: from a name to a segmentor that is ready for frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import the_mask.data
import the_mask.modeling  # noqa: F401  fills the registries
from the_mask.config import load_config
from the_mask.inference.runtimes import BACKENDS, use_runtime
from the_mask.inference.stream import StreamingSegmentor
from the_mask.models import model_config


def load(name_or_path: str | Path, backend: str = "auto", overrides: Sequence[str] = ()) -> StreamingSegmentor:
    """A trained model, ready for the frames of a video::

        segmentor = the_mask.load("street-live")
        state = segmentor.init_state()
        labels, state = segmentor.step(frame, state)  # frame: uint8 RGB [H, W, 3]; labels: [H, W]

    Args:
        name_or_path: a model that comes with the library (``the_mask.models.model_names()``), or a config file whose
            ``MODEL.WEIGHTS`` (or an override) names a checkpoint.
        backend: what runs its networks on a CPU: "eager" is PyTorch, "auto" the fastest that is installed, measured
            when a size is first seen; see :func:`the_mask.inference.runtimes.use_runtime`.
        overrides: flat list ``[KEY, VALUE, ...]`` of config keys, e.g. ``["MODEL.DEVICE", "cpu"]``.

    Raises:
        ValueError: an unknown name (with the nearest ones), a damaged file, a config without weights.
        FileNotFoundError: no such config file or weights.
    """
    if backend not in BACKENDS:  # before the weights are read
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    is_file = Path(name_or_path).suffix in (".yaml", ".yml")
    cfg = load_config(name_or_path, overrides) if is_file else model_config(str(name_or_path), [*map(str, overrides)])
    segmentor = StreamingSegmentor(cfg)
    if segmentor.model.device.type == "cpu" and backend != "eager":
        use_runtime(segmentor.model, backend)
    return segmentor
