"""Readers on damaged files: earlier findings, some new files, and a minute for each reader in the slow suite."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

import pytest
from fuzz_loop import MEMORY, corpus_of, problem
from fuzz_readers import READERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LOOP = Path(__file__).resolve().parent / "fuzz_loop.py"
# Readers that build a model, decode video or write a data set each time.
COSTLY = ("resume", "video", "archive", "prediction")


@pytest.mark.parametrize("name", READERS)
def test_good_files_and_earlier_findings(name: str, tmp_path: Path) -> None:
    case = READERS[name].prepare(tmp_path)
    for data in case.seeds:
        case.path.write_bytes(data)
        case.read()
    found = {text for data in corpus_of(name) if (text := problem(case, data)) is not None}
    assert not found


@pytest.mark.parametrize("name", [name for name in READERS if name not in COSTLY])
def test_some_damaged_files(name: str) -> None:
    """Hypothesis draws the mutations, so that it can shrink and remember what it finds."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        case = READERS[name].prepare(Path(folder))

        @settings(derandomize=True, max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.randoms(use_true_random=False), st.integers(0, len(case.seeds) - 1))
        def try_one(dice: Random, number: int) -> None:
            assert problem(case, READERS[name].mutate(dice, case.seeds[number])) is None

        try_one()


def fuzz(name: str, *options: str) -> str:
    """Run the loop in another process, so that a crash of C code does not end the tests."""
    with tempfile.TemporaryDirectory() as keep:
        command = [sys.executable, str(LOOP), name, "--keep", keep, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        findings = [path.read_bytes()[:200] for path in Path(keep).rglob("*") if path.is_file()]
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n{findings}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_minute(name: str) -> None:
    text = fuzz(name, "--seconds", "60", "--seed", str(Random().randrange(2**32)))
    print(text)
    assert int(re.search(r"(\d+) inputs", text)[1]) > 50  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_minute_guided_by_coverage(name: str) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed")
    text = fuzz(name, "--seconds", "60", "--engine", "atheris")
    print(text)
    assert int(re.search(r"(\d+) inputs", text)[1]) > 50  # type: ignore[index]
