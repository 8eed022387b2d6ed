"""setup.py: what THE_MASK_BUILD makes of a machine. Nothing is compiled here."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path as FilePath
from typing import Any

import pytest
import setuptools

ROOT = FilePath(__file__).resolve().parents[2]


def setup_arguments(monkeypatch: pytest.MonkeyPatch, mode: str | None) -> dict[str, Any]:
    """What setup.py hands to setuptools under THE_MASK_BUILD=mode."""
    if mode is None:
        monkeypatch.delenv("THE_MASK_BUILD", raising=False)
    else:
        monkeypatch.setenv("THE_MASK_BUILD", mode)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: seen.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    return seen


def test_off_builds_nothing(monkeypatch: pytest.MonkeyPatch):
    arguments = setup_arguments(monkeypatch, "off")
    assert not arguments.get("ext_modules")


def test_cpu_builds_the_cpu_sources(monkeypatch: pytest.MonkeyPatch):
    (extension,) = setup_arguments(monkeypatch, "cpu")["ext_modules"]
    assert extension.name == "the_mask.ops._C"
    assert {"csrc/bindings.cpp", "csrc/cpu/ops.cpp", "csrc/cpu/isa_avx512.cpp"} <= set(extension.sources)
    assert not any("cuda" in source for source in extension.sources)


def test_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SystemExit, match="THE_MASK_BUILD=gpu: expected one of auto, off, cpu, cuda"):
        setup_arguments(monkeypatch, "gpu")


def test_what_is_asked_for_must_be_possible(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Without torch: an error for cpu and cuda, a notice for auto."""
    monkeypatch.setitem(sys.modules, "torch", None)
    for mode in ("cpu", "cuda"):
        with pytest.raises(SystemExit, match=f"THE_MASK_BUILD={mode} needs torch"):
            setup_arguments(monkeypatch, mode)
    assert not setup_arguments(monkeypatch, None).get("ext_modules")
    assert "no kernels are built" in capsys.readouterr().err
