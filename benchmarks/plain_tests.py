"""Runs a file of pytest tests that use parameters and nothing else, with or without pytest installed."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """Result of one test: "passed", "failed" or "skipped", with the error or the reason."""

    name: str
    result: str
    message: str


class SkippedError(Exception):
    """A test that cannot run here."""


def _stand_in() -> ModuleType:
    """The part of pytest that such a file needs: marks with parameters; ``raises`` is left out on purpose."""
    module = ModuleType("pytest")

    def parametrize(names: str, values: Any) -> Callable[[Any], Any]:
        return _marked(SimpleNamespace(name="parametrize", args=(names, list(values)), kwargs={}))

    def skipif(condition: bool, reason: str = "") -> SimpleNamespace:
        return SimpleNamespace(name="skipif", args=(condition,), kwargs={"reason": reason})

    def skip(reason: str) -> None:
        raise SkippedError(reason)

    marks = {"parametrize": parametrize, "skipif": skipif, "cuda": SimpleNamespace(name="cuda", args=(), kwargs={})}
    module.mark = SimpleNamespace(**marks)  # type: ignore[attr-defined]
    module.skip = skip  # type: ignore[attr-defined]
    return module


def _marked(mark: Any) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        function.pytestmark = [*getattr(function, "pytestmark", []), mark]
        return function

    return add


def load_tests(path: Path) -> ModuleType:
    """Import a test file; a stand-in for pytest serves where it is not installed."""
    if str(path.parents[1]) not in sys.path:
        sys.path.append(str(path.parents[1]))  # what all tests share
    alone = importlib.util.find_spec("pytest") is None
    if alone:
        sys.modules["pytest"] = _stand_in()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    finally:
        if alone:
            del sys.modules["pytest"]
    return module


def calls_of(function: Any) -> Iterator[dict[str, Any]]:
    """Arguments of every call that the marks ask for."""
    axes = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            names = [name.strip() for name in mark.args[0].split(",")]
            values = [value if len(names) > 1 else (value,) for value in mark.args[1]]
            axes.append([dict(zip(names, value, strict=True)) for value in values])
    for parts in itertools.product(*axes):
        yield {name: value for part in parts for name, value in part.items()}


def run_tests(path: Path, seconds: float) -> list[Outcome]:
    """Run all tests of a file; those that do not begin within ``seconds`` are skipped."""
    module = load_tests(path)
    whole = getattr(module, "pytestmark", [])
    for mark in whole if isinstance(whole, list) else [whole]:
        if mark.name == "skipif" and mark.args[0]:
            return [Outcome(path.name, "skipped", str(mark.kwargs["reason"]))]
    end = time.monotonic() + seconds
    outcomes = []
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if not name.startswith("test_") or function.__module__ != module.__name__:
            continue
        for arguments in calls_of(function):
            title = f"{name}[{'-'.join(str(value) for value in arguments.values())}]" if arguments else name
            outcomes.append(_run(title, function, arguments, end))
    return outcomes


def _run(title: str, function: Any, arguments: dict[str, Any], end: float) -> Outcome:
    if time.monotonic() > end:
        return Outcome(title, "skipped", "no time left")
    try:
        function(**arguments)
    except Exception as error:  # noqa: BLE001  a test may fail in any way; it is reported, never hidden
        if type(error).__name__ in ("SkippedError", "Skipped"):
            return Outcome(title, "skipped", str(error))
        last = traceback.format_exc().strip().splitlines()[-12:]
        return Outcome(title, "failed", "\n".join(last))
    except BaseException as error:
        # pytest's own skip is no Exception.
        if type(error).__name__ != "Skipped":
            raise
        return Outcome(title, "skipped", str(error))
    return Outcome(title, "passed", "")
