"""Models as folders, locally and on the Hugging Face hub.

A folder has ``model.safetensors``, ``config.yaml`` (the complete config) and ``README.md``, the card: facts between two
lines ``---``, then text. Nothing in it is executed: a config that would import modules or read other files is refused.

The hub needs ``pip install "the_mask[hub]"``; the client is imported only for hub models. Its address, login and cache
are configured in the client (``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME``, ``HF_HUB_OFFLINE``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from the_mask.config import ConfigFile, load_config, read_config
from the_mask.config.compose import BASE, flat_keys
from the_mask.config.strict_yaml import parse_yaml
from the_mask.data.files import read_text, remove_leftovers
from the_mask.models import Card, check_digest, parse_card
from the_mask.weights.hub import CARD, CONFIG, FILES, WEIGHTS, hub_client
from the_mask.weights.packing import LEFT_OUT, ModelFiles, write_model

# Facts that the hub displays and searches by.
HUB_FACTS: dict[str, Any] = {
    "library_name": "the_mask",
    "pipeline_tag": "image-segmentation",
    "tags": ["video-semantic-segmentation", "semantic-segmentation"],
}


def save_pretrained(
    cfg: CfgNode,
    folder: str | Path,
    facts: Mapping[str, Any] | None = None,
    *,
    halve: bool = False,
    trust_pickle: bool = False,
) -> Path:
    """Write the model of a config as a folder. Facts and text of an existing card are kept.

    Args:
        cfg: with ``MODEL.WEIGHTS``.
        folder: created if needed; its last part is the model's name.
        facts: facts for the card: ``license``, ``datasets``, ``metrics``, ...; they replace those of an existing card.
        halve: store matrices and kernels in float16, which halves the size and rounds the values.
        trust_pickle: of :func:`the_mask.weights.load_weights`.

    Returns:
        The folder.

    Raises:
        ValueError: no weights, or weights that do not fill the model.
        FileNotFoundError: no such weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    files = ModelFiles(folder / WEIGHTS, folder / CONFIG, folder / CARD)
    write_model(
        cfg, files, folder.resolve().name, HUB_FACTS | dict(facts or {}), halve=halve, trust_pickle=trust_pickle
    )
    return folder


def read_pretrained(folder: str | Path, overrides: Sequence[str] = ()) -> tuple[CfgNode, Card]:
    """Read the config and card of a folder; the weights are checked against the card and set as ``MODEL.WEIGHTS``.

    Args:
        folder: of :func:`save_pretrained`.
        overrides: flat list ``[KEY, VALUE, ...]`` on top.

    Raises:
        FileNotFoundError: one of the three files is missing.
        ValueError: a damaged card or weights, or a config that imports modules or has a base.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS, CARD):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is not a model: {name} is missing (the-mask publish writes all three files)"
            )
    card = parse_card(folder.resolve().name, read_text(folder / CARD, "card"))
    check_digest(folder / WEIGHTS, str(card.facts["sha256"]), "get it again")
    path = folder / CONFIG
    # The file may be untrusted, so references out of it are refused before they are followed.
    body = parse_yaml(path.read_bytes(), str(path))
    if isinstance(body, dict) and BASE in body:
        raise ValueError(f"{path}: the config of a model is whole, but this one has {BASE}")
    tree = read_config(ConfigFile(path))
    datasets = tree.get("DATASETS")
    if isinstance(datasets, dict) and datasets.get("IMPORT"):
        raise ValueError(
            f"{path}: DATASETS.IMPORT runs code, which a model's config must not; delete it if you trust it"
        )
    # What belongs to a machine is not taken from a file of others: a training would write there, or send curves.
    defaults = dict(flat_keys(load_config()))
    own = [word for key in LEFT_OUT for word in (key, repr(defaults[key]))]
    return load_config(path.resolve(), [*own, "MODEL.WEIGHTS", str(folder / WEIGHTS), *overrides]), card


def push_to_hub(
    folder: str | Path, repo_id: str, *, private: bool = True, token: str | None = None, endpoint: str = ""
) -> str:
    """Upload a folder to the hub in one commit. The repository is created if needed.

    Args:
        folder: written by :func:`save_pretrained`; read and checked first.
        repo_id: ``owner/name``.
        private: whether a new repository is private.
        token: access token with write permission; None takes that of ``hf auth login`` or ``HF_TOKEN``.
        endpoint: address of the hub; "" takes the client's default.

    Returns:
        Address of the commit.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
        FileNotFoundError, ValueError: the folder is not a complete model.
        OSError: the hub refuses, or cannot be reached.
    """
    read_pretrained(folder)
    hub = hub_client()
    api = hub.HfApi(endpoint=endpoint or None, token=token, library_name="the_mask")
    api.create_repo(repo_id, private=private, exist_ok=True)
    # Not upload_folder, which may make several commits: between them the card would not fit the weights.
    files = [hub.CommitOperationAdd(name, str(Path(folder) / name)) for name in FILES]
    commit = api.create_commit(repo_id, files, commit_message="Model of the_mask")
    return str(commit.commit_url)
