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

# What takes the place of names that deal with single images of instances.
OURS = {
    "detectron2.engine.DefaultTrainer": "the_mask.engine.Trainer",
    "detectron2.engine.default_setup": "the_mask.engine.setup",
    "detectron2.data.DatasetMapper": "the_mask.data.ClipMapper",
    "detectron2.data.build_detection_train_loader": "the_mask.data.build_train_loader",
    "detectron2.data.build_detection_test_loader": "the_mask.data.build_test_loader",
}


def not_provided(package: str) -> Callable[[str], Any]:
    """Return a module ``__getattr__`` that explains which name of ``package`` is missing.

    It raises ``ImportError``, because ``from package import name`` replaces the message of an ``AttributeError`` by its
    own. Submodules not imported yet and dunder names get the ``AttributeError`` that the import system expects.
    """

    def __getattr__(name: str) -> NoReturn:
        is_package = "__path__" in vars(sys.modules[package])
        if name.startswith("__") or (is_package and find_spec(f"{package}.{name}") is not None):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        ours = OURS.get(f"{package}.{name}")
        hint = f"for video use {ours} (docs/start/reproduce.md), or " if ours else ""
        raise ImportError(
            f"{package}.{name} is not provided by the embedded runtime; {hint}{HOW_TO_INSTALL}", name=package
        )

    return __getattr__
