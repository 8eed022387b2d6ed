"""fvcore's ``Registry``, and objects by their dotted name."""

from __future__ import annotations

import pydoc
from typing import Any

from fvcore.common.registry import Registry

__all__ = ["Registry", "locate"]


def locate(name: str) -> Any:
    """Return the object with the dotted name ``package.module.Class.method``.

    Raises:
        ImportError: there is none.
    """
    found = pydoc.locate(name)
    if found is None:
        raise ImportError(f"Cannot dynamically locate object {name}!")
    return found
