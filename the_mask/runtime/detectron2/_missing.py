"""The answer to every name of Detectron2 that the embedded runtime leaves out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NoReturn

HOW_TO_INSTALL = (
    "install Detectron2 (https://detectron2.readthedocs.io/en/latest/tutorials/install.html); "
    "an installed one is preferred to the embedded runtime automatically"
)


def not_provided(package: str) -> Callable[[str], Any]:
    """Return a module ``__getattr__`` that explains which name of ``package`` is missing.

    It raises ``ImportError``, because ``from package import name`` replaces the message of an ``AttributeError`` by its
    own. Submodules not imported yet and dunder names get the ``AttributeError`` that the import system expects.
    """

    def __getattr__(name: str) -> NoReturn:
        is_package = "__path__" in vars(sys.modules[package])
        if name.startswith("__") or (is_package and find_spec(f"{package}.{name}") is not None):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        raise ImportError(f"{package}.{name} is not provided by the embedded runtime; {HOW_TO_INSTALL}", name=package)

    return __getattr__
