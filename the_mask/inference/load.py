"""``the_mask.load``: loads a trained model by name, ready for frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

import the_mask.data
import the_mask.modeling  # noqa: F401  fills the registries
from the_mask.config import load_config
from the_mask.inference.runtimes import BACKENDS, prepare_stream
from the_mask.inference.stream import StreamingSegmentor
from the_mask.models import Card, model_config, model_names, read_card
from the_mask.weights.pretrained import fetch_pretrained, hub_id, read_pretrained


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
    if backend not in BACKENDS:  # before the weights are read
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    segmentor = StreamingSegmentor(find_model(name_or_path, overrides)[0])
    if segmentor.model.device.type == "cpu" or precision != "float32":
        prepare_stream(segmentor, backend, precision, calibrate)
    return segmentor


def find_model(
    name_or_path: str | Path, overrides: Sequence[str] = (), refresh: bool = False
) -> tuple[CfgNode, Card | None]:
    """Find the config and card of a trained model.

    Args:
        name_or_path: a model that comes with the library (``the_mask.models.model_names()``); a folder that
            ``save_pretrained`` wrote; a config file whose ``MODEL.WEIGHTS`` (or an override) names a checkpoint; or a
            model of the Hugging Face hub, ``owner/name`` or ``owner/name@revision``. Only the last uses the network,
            and only for files that are not in the cache.
        overrides: flat list ``[KEY, VALUE, ...]`` of config keys.
        refresh: for a hub model, look for a newer version.

    Returns:
        The config, whose ``MODEL.WEIGHTS`` is the checkpoint, and the card; None for a config file.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: see :func:`load`.
    """
    name, words = str(name_or_path), [*map(str, overrides)]
    if name in model_names():
        return model_config(name, words), read_card(name)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return read_pretrained(path, words)
    if path.suffix in (".yaml", ".yml"):
        return load_config(name_or_path, words), None
    hub = hub_id(name)
    if hub is not None:
        return read_pretrained(fetch_pretrained(*hub, refresh=refresh), words)
    if len(path.parts) > 1:
        raise FileNotFoundError(f"{name}: no such folder, config file or hub model")
    return model_config(name, words), None
