"""``csrc/cuda_check.py``: reading of the compilers' output, finding a toolkit, and the check itself."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "csrc" / "cuda_check.py"

OUTPUT = """\
ptxas info    : Compiling entry function '_Z3oneIfEvv' for 'sm_90'
ptxas info    : Function properties for _Z3oneIfEvv
    16 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 16 bytes cumulative stack size, 8192 bytes smem
ptxas info    : Compiling entry function '_Z3twov' for 'sm_80'
ptxas info    : Function properties for _Z3twov
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_check"] = module
    spec.loader.exec_module(module)
    return module


def test_reads_what_ptxas_says(script: ModuleType) -> None:
    assert script.parse_ptxas(OUTPUT) == [
        script.Kernel("sm_90", "_Z3oneIfEvv", 48, 28, 8192),
        script.Kernel("sm_80", "_Z3twov", 10, 0, 0),
    ]


def test_finds_the_toolkit_behind_a_script(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "front" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/toolkit/bin/..' >&2\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert script.find_toolkit() == tmp_path / "toolkit"


def test_is_skipped_without_nvcc(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "skipped: no nvcc" in done.stdout


@pytest.mark.slow
def test_the_kernels_compile_link_and_load() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    if "skipped" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert done.stdout.count("registered for CUDA") == 4
