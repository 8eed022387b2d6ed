"""Models of the Hugging Face hub: names and downloads; see :mod:`the_mask.weights.pretrained`."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)
CARD, CONFIG, WEIGHTS = FILES = ("README.md", "config.yaml", "model.safetensors")
HUB_PREFIX = "hf://"
# owner/name, optionally followed by "@" and a branch, tag or commit.
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^@\s]+))?")


def hub_id(name: str) -> tuple[str, str | None] | None:
    """Repository and revision of a hub model's name: ``owner/name``, ``owner/name@revision``, ``hf://...``; else None.

    A name whose first part is an existing folder is a path, not a hub model.
    """
    explicit = name.startswith(HUB_PREFIX)
    match = _HUB_ID.fullmatch(name.removeprefix(HUB_PREFIX))
    if match is None or (not explicit and Path(name.split("/")[0]).exists()):
        return None
    return match["id"], match["revision"]


def fetch_pretrained(
    repo_id: str, revision: str | None = None, *, refresh: bool = False, token: str | None = None, endpoint: str = ""
) -> Path:
    """Download a hub model and return its folder. Cached files are used without network access.

    Args:
        repo_id: ``owner/name``.
        revision: branch, tag or commit; None is the main branch, as it was when first downloaded.
        refresh: look for a newer version of the revision.
        token: access token for a private model; None takes that of ``hf auth login`` or ``HF_TOKEN``.
        endpoint: address of the hub; "" takes the client's default.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
        FileNotFoundError: no such model, revision or file there, or the hub cannot be reached.
    """
    hub = hub_client()
    found = []
    for name in FILES:
        arguments: dict[str, Any] = {"revision": revision, "token": token, "endpoint": endpoint or None}
        arguments |= {"library_name": "the_mask"}
        place = "" if refresh else _cached(hub, repo_id, name, revision)
        if not place:
            logger.info("%s: %s comes from %s", repo_id, name, endpoint or hub.constants.ENDPOINT)
            try:
                place = hub.hf_hub_download(repo_id, name, **arguments)
            except hub.errors.LocalEntryNotFoundError as error:
                raise FileNotFoundError(
                    f"{repo_id}: there is no such folder here, and as a model of the hub it was not fetched before and "
                    f"{endpoint or hub.constants.ENDPOINT} cannot be reached (no network, or HF_HUB_OFFLINE is set)"
                ) from error
            except hub.errors.RepositoryNotFoundError as error:
                raise FileNotFoundError(
                    f"the hub has no model {repo_id}, or it is private and you are not logged in (hf auth login)"
                ) from error
            except hub.errors.RevisionNotFoundError as error:
                raise FileNotFoundError(f"{repo_id} on the hub has no branch, tag or commit {revision!r}") from error
            except hub.errors.RemoteEntryNotFoundError as error:
                raise FileNotFoundError(f"{repo_id} on the hub is no model of the_mask: it has no {name}") from error
        found.append(Path(place).parent)
    if len(set(found)) != 1:
        # One file came from a newer commit than another one in the cache.
        return fetch_pretrained(repo_id, revision, refresh=True, token=token, endpoint=endpoint)
    return found[0]


def _cached(hub: ModuleType, repo_id: str, name: str, revision: str | None) -> str:
    place = hub.try_to_load_from_cache(repo_id, name, revision=revision)
    return place if isinstance(place, str) else ""


def hub_client() -> ModuleType:
    """The client, ``huggingface_hub``.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('models of the hub need huggingface_hub: pip install "the_mask[hub]"') from error
    return huggingface_hub
