"""Which path runs and what is said about it; an extension that is missing, broken or of another torch."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path as FilePath

import pytest
import torch
from ops_cases import MSDA_CASES, Path

from the_mask.ops import explain, extension, ms_deform_attn, selection, use


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
        check=False,
    )


def test_explain_names_the_path():
    with use("portable"):
        text = explain()
        assert "mode portable" in text
        assert "ms_deform_attn, dcnv3, upsample_argmax on cpu: portable" in text
    with Path("compiled").running():
        assert "on cpu: compiled" in explain()
        assert "CPU code for" in explain()


def test_environment_variable_forces_a_path():
    done = run_python("from the_mask.ops import explain; print(explain())", THE_MASK_OPS="reference")
    assert "on cpu: reference (THE_MASK_OPS or use() asks for it)" in done.stdout, done.stderr
    done = run_python("import the_mask.ops", THE_MASK_OPS="fast")
    assert done.returncode != 0
    assert "THE_MASK_OPS='fast': expected one of auto, reference, portable, compiled" in done.stderr


def test_use_restores_and_refuses():
    before = selection.choose(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="inside"), use("reference"):
        raise RuntimeError("inside")
    assert selection.choose(torch.device("cpu")) == before
    with pytest.raises(ValueError, match="mode='fast'"), use("fast"):
        pass


def test_compiled_asked_for_but_missing_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extension, "missing_for", lambda device, operator=None: "it was never built")
    case = MSDA_CASES[1]
    value, locations, weights = case.arguments(torch.float32)
    with use("compiled"), pytest.raises(RuntimeError, match="never built"):
        ms_deform_attn(value, case.levels, None, locations, weights)
    with use("compiled"):
        assert "error: THE_MASK_OPS=compiled" in explain()


def test_one_notice_when_auto_has_no_kernel(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(extension, "missing_for", lambda device, operator=None: "it was never built")
    monkeypatch.setattr(selection, "_noticed", False)
    with use("auto"), caplog.at_level(logging.WARNING, "the_mask.ops"):
        assert selection.choose(torch.device("cpu")).path == "portable"
        selection.choose(torch.device("cpu"))
    assert [record.getMessage() for record in caplog.records] == [
        "the_mask.ops runs on the portable PyTorch path: it was never built"
    ]


def test_errors_of_a_kernel_are_not_hidden(monkeypatch: pytest.MonkeyPatch):
    """A failing kernel fails; nothing falls back on another path."""
    with Path("compiled").running():
        case = MSDA_CASES[1]
        value, locations, weights = case.arguments(torch.float32)
        monkeypatch.setattr(
            "the_mask.ops.msda.op._kernel_arguments", lambda *arguments: (value.detach(), [1, 1], None, value, value)
        )
        with pytest.raises(RuntimeError):
            ms_deform_attn(value, case.levels, None, locations, weights)


def test_broken_libraries_are_reported(tmp_path: FilePath):
    assert "not built" in str(extension._load(None).problem)
    library = tmp_path / "_C.so"
    library.write_bytes(b"no library at all")
    assert "not a library of this project" in str(extension._load(library).problem)
    library.write_bytes(b"")
    assert "cannot be loaded" in str(extension._load(library).problem)
    library.write_bytes(b"\x7fELF THE_MASK_BUILT_FOR torch=1.0.0;cuda=;")
    assert "was built for torch 1.0.0 and this is torch" in str(extension._load(library).problem)
    here = torch.__version__.split("+")[0]
    library.write_bytes(b"\x7fELF THE_MASK_BUILT_FOR torch=" + here.encode() + b";cuda=;")
    assert "cannot be loaded" in str(extension._load(library).problem)


def test_library_of_another_torch_does_not_stop_the_import(tmp_path: FilePath):
    """In a process of its own, with a stand-in library in the place of the real one."""
    library = tmp_path / "_C.so"
    library.write_bytes(b"\x7fELF THE_MASK_BUILT_FOR torch=1.0.0;cuda=;")
    code = f"""
import importlib.util, pathlib, sys, types
from pathlib import Path
import the_mask
real_glob = Path.glob
Path.glob = lambda self, pattern: iter([Path({str(library)!r})] if pattern == "_C*.so" else [])
import the_mask.ops as ops
Path.glob = real_glob
import torch
levels = [(2, 3)]
print(ops.explain())
print(ops.ms_deform_attn(torch.ones(1, 6, 1, 4), levels, None, torch.full((1, 2, 1, 1, 1, 2), 0.5),
                         torch.ones(1, 2, 1, 1, 1)).sum().item())
"""
    done = run_python(code, THE_MASK_OPS="auto")
    assert done.returncode == 0, done.stderr
    assert "was built for torch 1.0.0" in done.stdout
    assert "8.0" in done.stdout
    assert done.stderr.count("runs on the portable PyTorch path") == 1


def test_stamp_of_the_real_library():
    with Path("compiled").running():
        path = extension.LOADED.path
        assert path is not None
        stamp = extension.read_stamp(path)
        assert stamp is not None
        assert stamp[0] == torch.__version__.split("+")[0]


@pytest.mark.skipif(not (sys.platform == "linux" and torch.backends.openmp.is_available()), reason="no OpenMP here")
def test_kernels_are_built_with_threads():
    """Without the compiler's flag at::parallel_for is a loop on one thread, with the same results."""
    with Path("compiled").running():
        library = extension.LOADED.path.read_bytes()
        assert b"GOMP_parallel" in library or b"__kmpc_fork_call" in library


def test_unknown_cpu_code_is_refused():
    with Path("compiled").running(), pytest.raises(RuntimeError, match="CPU capability AVX-9"):
        torch.ops.the_mask_kernels.force_cpu_capability("AVX-9")
