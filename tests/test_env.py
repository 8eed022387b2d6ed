"""Which Detectron2 is chosen, and the environment report."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import the_mask
from the_mask._detectron2 import RUNTIME, select_detectron2
from the_mask.env import detectron2_flavour, environment_report

ROOT = Path(the_mask.__file__).resolve().parent.parent


def run(code: str, cwd: Path, mode: str | None = None, path: list[Path] | None = None) -> str:
    """Run Python code in a new process and return what it prints."""
    environment = {k: v for k, v in os.environ.items() if k not in ("THE_MASK_D2", "PYTHONPATH")}
    environment["PYTHONPATH"] = os.pathsep.join(str(p) for p in [*(path or []), ROOT])
    if mode is not None:
        environment["THE_MASK_D2"] = mode
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WHICH = """
import the_mask, importlib.util
spec = importlib.util.find_spec("detectron2")
print(spec.origin if spec else None)
"""
# A process started by multiprocessing that never imports the_mask itself.
IN_A_CHILD = """
import multiprocessing, importlib.util
def origin(_):
    return importlib.util.find_spec("detectron2").origin
if __name__ == "__main__":
    import the_mask
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(origin, [0])[0])
"""


@pytest.fixture
def fake_install(tmp_path: Path) -> Path:
    """Return a folder for PYTHONPATH with a regular package ``detectron2`` in it."""
    package = tmp_path / "site" / "detectron2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '9.9'\n")
    return package.parent


def test_an_installed_detectron2_wins(tmp_path: Path, fake_install: Path) -> None:
    assert run(WHICH, tmp_path, path=[fake_install]) == str(fake_install / "detectron2" / "__init__.py")
    assert run(WHICH, tmp_path, "real", [fake_install]) == str(fake_install / "detectron2" / "__init__.py")


def test_embedded_can_be_forced(tmp_path: Path, fake_install: Path) -> None:
    assert run(WHICH, tmp_path, "embedded", [fake_install]) == str(RUNTIME / "detectron2" / "__init__.py")


def test_embedded_runs_where_there_is_no_other(tmp_path: Path) -> None:
    # A stray folder of that name in the working directory is not an installation.
    (tmp_path / "detectron2").mkdir()
    assert run(WHICH, tmp_path) == str(RUNTIME / "detectron2" / "__init__.py")


def test_real_does_not_fall_back(tmp_path: Path) -> None:
    assert run(WHICH, tmp_path, "real") == "None"


def test_spawned_processes_find_the_same_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(IN_A_CHILD)
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    assert run(code, tmp_path) == str(RUNTIME / "detectron2" / "__init__.py")


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="THE_MASK_D2=fake"):
        select_detectron2("fake")


def test_selection_is_made_once() -> None:
    path = list(sys.path)
    select_detectron2("auto")
    select_detectron2("embedded")
    assert sys.path == path


def test_report_names_what_runs() -> None:
    report = environment_report()
    facts = dict(re.findall(r"^(\S+) +(.*)$", report, flags=re.MULTILINE))
    assert facts["the_mask"].startswith(the_mask.__version__)
    assert facts["detectron2"].startswith(detectron2_flavour())
    assert torch.__version__ in facts["torch"]
    assert torch.backends.cpu.get_cpu_capability() in facts["cpu"]
    assert "fvcore" in facts["packages"]
    assert "DETECTRON2_DATASETS" in facts["datasets"]
    assert "ms_deform_attn" in report
    assert "not available" not in report


def test_report_of_the_dataset_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "gone"))
    assert f"{tmp_path / 'gone'} (DETECTRON2_DATASETS; does not exist)" in environment_report()


def test_report_survives_a_missing_detectron2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "detectron2", None)  # what THE_MASK_D2=real leads to without an installation
    report = environment_report()
    assert re.search(r"^detectron2 +not available: ModuleNotFoundError", report, flags=re.MULTILINE)
    assert "ms_deform_attn" in report


def test_a_file_that_hides_detectron2_is_named(tmp_path: Path) -> None:
    """``python -m the_mask.env`` in a folder with the user's own detectron2.py, which comes first on the path."""
    (tmp_path / "detectron2.py").write_text("")
    code = "from the_mask.env import environment_report; print(environment_report())"
    report = run(code, tmp_path, path=[tmp_path])
    assert re.search(
        r"^detectron2 +not available: ImportError: .*detectron2.py hides the package", report, re.MULTILINE
    )
    assert "torch" in report


def test_module_runs_as_a_command(tmp_path: Path) -> None:
    code = "import runpy; runpy.run_module('the_mask.env', run_name='__main__')"
    report = run(code, tmp_path)
    assert re.search(r"^detectron2 +embedded", report, flags=re.MULTILINE)


def python_files(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")) if file.is_file()]


def test_command_lines_import_detectron2_only_through_the_mask() -> None:
    """A script that imports detectron2 before the_mask would not find the embedded runtime."""
    pattern = re.compile(r"^\s*(from|import) detectron2\b", flags=re.MULTILINE)
    offenders = [
        str(file) for file in python_files("tools", "datasets", "benchmarks") if pattern.search(file.read_text())
    ]
    assert not offenders


def test_no_relative_import_leaves_the_runtime() -> None:
    """The runtime must not import the_mask: it stands in for a package that knows nothing of it."""
    pattern = re.compile(r"^\s*(from|import) (the_mask|detectron2)\b", flags=re.MULTILINE)
    offenders = [str(file) for file in RUNTIME.rglob("*.py") if pattern.search(file.read_text())]
    assert not offenders
