"""What only the embedded runtime promises: clear errors for what it lacks, light imports, and its size."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from the_mask._detectron2 import RUNTIME
from the_mask.env import detectron2_flavour

embedded_only = pytest.mark.skipif(detectron2_flavour() != "embedded", reason="a real Detectron2 is in use")
MODULES = sorted(
    ".".join(file.relative_to(RUNTIME).with_suffix("").parts).removesuffix(".__init__")
    for file in RUNTIME.rglob("*.py")
)
LEFT_OUT = [
    "detectron2.evaluation",
    "detectron2.model_zoo",
    "detectron2.projects",
    "detectron2.export",
    "detectron2.data.transforms",
    "detectron2.data.datasets",
    "detectron2.data.samplers",
    "detectron2.utils.visualizer",
]


@embedded_only
@pytest.mark.parametrize("module", LEFT_OUT)
def test_modules_left_out_say_what_to_do(module: str) -> None:
    with pytest.raises(ImportError, match="not provided by the embedded runtime; install Detectron2") as caught:
        importlib.import_module(module)
    assert module in str(caught.value)
    parent, _, name = module.rpartition(".")
    with pytest.raises(ImportError, match="install Detectron2"):
        exec(f"from {parent} import {name}")


@embedded_only
@pytest.mark.parametrize(
    "statement",
    [
        "from detectron2.config import LazyConfig",
        "from detectron2.data import build_detection_train_loader",
        "from detectron2.engine import DefaultTrainer",
        "from detectron2.engine.hooks import PreciseBN",
        "from detectron2.layers import DeformConv",
        "from detectron2.modeling import GeneralizedRCNN",
        "from detectron2.modeling.backbone import FPN",
        "from detectron2.solver import build_lr_scheduler",
        "from detectron2.structures import Instances",
    ],
)
def test_names_left_out_say_what_to_do(statement: str) -> None:
    name = statement.split()[-1]
    with pytest.raises(ImportError, match=rf"{name} is not provided by the embedded runtime; .*install Detectron2"):
        exec(statement)


@embedded_only
def test_names_that_have_a_counterpart_say_which() -> None:
    from detectron2._missing import OURS

    for full, ours in OURS.items():
        module, _, name = ours.rpartition(".")
        assert hasattr(importlib.import_module(module), name)
        package, _, name = full.rpartition(".")
        with pytest.raises(ImportError, match=f"for video use {re.escape(ours)}"):
            exec(f"from {package} import {name}")


@embedded_only
def test_submodules_can_be_imported_from_their_package() -> None:
    for statement in ("from detectron2.utils import comm", "from detectron2 import layers", "import detectron2.engine"):
        exec(statement)
    package = importlib.import_module("detectron2.layers")
    assert not hasattr(package, "__wrapped__")


@pytest.mark.parametrize("module", [name for name in MODULES if name not in LEFT_OUT])
def test_every_module_exists_upstream_too(module: str) -> None:
    """With a real Detectron2 this checks that the embedded one has upstream's layout."""
    if detectron2_flavour() == "real" and module in {"detectron2._missing", "detectron2.checkpoint.align"}:
        pytest.skip("internal to the embedded runtime")
    importlib.import_module(module)


def public_names() -> list[tuple[str, str]]:
    """Return (module, name) for every ``__all__`` of the embedded runtime."""
    found = []
    for file in RUNTIME.rglob("*.py"):
        module = ".".join(file.relative_to(RUNTIME).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                found += [(module, name) for name in ast.literal_eval(node.value)]
    return found


def test_public_names_of_the_embedded_runtime_are_public_upstream_too() -> None:
    """From either runtime, so that code written against the embedded one runs on a real Detectron2."""
    names = public_names()
    assert ("detectron2.config", "configurable") in names
    assert [(m, n) for m, n in names if not hasattr(importlib.import_module(m), n)] == []


@embedded_only
def test_import_is_free_of_fvcore_nn_and_warnings() -> None:
    """fvcore.nn compiles TorchScript at import: seconds, and deprecation warnings in every log."""
    names = ["config", "data", "engine", "layers", "modeling", "checkpoint", "solver", "structures", "utils.events"]
    code = "import the_mask, sys\n" + "\n".join(f"import detectron2.{name}" for name in names)
    code += "\nassert not [m for m in sys.modules if m.startswith('fvcore.nn')]"
    # Only this warning: other packages may deprecate what they like.
    command = [sys.executable, "-W", "error:`torch.jit:FutureWarning", "-c", code]
    subprocess.run(command, check=True, timeout=120)


def docstring_lines(file: Path) -> set[int]:
    """Return the numbers of the lines that docstrings take."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            found |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return found


def test_size_of_the_embedded_runtime() -> None:
    """Architecture: about 2,500 lines of code at the most, without blank lines, comments and docstrings."""
    total = 0
    for file in RUNTIME.rglob("*.py"):
        lines = file.read_text().splitlines()
        code = {n for n, line in enumerate(lines, start=1) if line.strip() and not line.strip().startswith("#")}
        total += len(code - docstring_lines(file))
    assert total <= 2500, total


def test_runtime_folder_is_not_a_package() -> None:
    assert not (Path(RUNTIME) / "__init__.py").exists()
