"""Identify models by the content of their weights."""

from __future__ import annotations

import hashlib

from torch import nn


def weights_digest(model: nn.Module, extra: str = "") -> str:
    """SHA-256 of every name and value of ``state_dict``, and of ``extra``; independent of the file they came from.

    A collective call when the weights are sharded.
    """
    digest = hashlib.sha256(extra.encode())
    for name, value in sorted(model.state_dict().items()):
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        digest.update(name.encode())
        digest.update(whole.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
