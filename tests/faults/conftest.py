"""Faster fault tests: files in memory where possible, without flushing all disks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from injection import INJECTED

MEMORY = Path("/dev/shm")
ALONE = "THE_MASK_TEST_ALONE"
SUMMARY = "faults injected: "


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """As pytest's, but in memory, and deleted afterwards."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None, prefix="the_mask_faults_") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip os.sync, which these tests would call some thousand times."""
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test marked ``alone`` in another process."""
    if pyfuncitem.get_closest_marker("alone") is None or ALONE in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-m", "", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"{pyfuncitem.path}::{pyfuncitem.name}"],
        env={**os.environ, ALONE: "1"},
        cwd=pyfuncitem.config.rootpath,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    for count, kind in re.findall(r"(\d+) ([a-z ]+)", done.stdout.partition(SUMMARY)[2].partition("\n")[0]):
        INJECTED[kind] += int(count)
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the number of faults."""
    if INJECTED:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(INJECTED.items()))
        terminalreporter.write_line(f"{SUMMARY}{counts}")
