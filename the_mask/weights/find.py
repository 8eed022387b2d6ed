"""From a name, a folder, a config or a hub model to the config of a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from the_mask.config import load_config
from the_mask.models import Card, model_config, model_names, read_card
from the_mask.weights.hub import fetch_pretrained, hub_id
from the_mask.weights.pretrained import read_pretrained


def find_model(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    refresh: bool = False,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[CfgNode, Card | None]:
    """Config and card of a trained model.

    Args:
        name_or_path: a model that comes with the library (``the_mask.models.model_names()``); a folder that
            ``save_pretrained`` wrote; a config file whose ``MODEL.WEIGHTS`` (or an override) names a checkpoint; or a
            model of the Hugging Face hub, ``owner/name`` or ``owner/name@revision``. Only the last uses the network,
            and only for what was not fetched before.
        overrides: flat list ``[KEY, VALUE, ...]`` of config keys.
        refresh: of a hub model, look for a newer state.
        revision: of a hub model: branch, tag or commit, in place of ``@revision``.
        token: of a private hub model; None takes that of ``hf auth login`` or ``HF_TOKEN``.

    Returns:
        The config, whose ``MODEL.WEIGHTS`` is the checkpoint, and the card; None for a config file.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: see :func:`the_mask.inference.load.load`. Also ValueError: a
            ``revision`` of something else than a hub model, or two of them.
    """
    name, words = str(name_or_path), [*map(str, overrides)]
    hub = hub_id(name)
    if revision is not None and (hub is None or hub[1] not in (None, revision)):
        raise ValueError(f"revision {revision!r} of {name}: expected a model of the hub, owner/name, and one revision")
    if name in model_names():
        return model_config(name, words), read_card(name)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return read_pretrained(path, words)
    if path.suffix in (".yaml", ".yml"):
        return load_config(name_or_path, words), None
    if hub is not None:
        folder = fetch_pretrained(hub[0], revision or hub[1], refresh=refresh, token=token)
        return read_pretrained(folder, words)
    if len(path.parts) > 1:
        raise FileNotFoundError(f"{name}: no such folder, config file or hub model")
    return model_config(name, words), None
