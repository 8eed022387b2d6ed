"""The CPU kernels under the compiler's sanitizers: addresses and undefined behaviour in the operators' tests, and races
between threads in every division of their work.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
# The operators' tests that run compiled code; tracing and modules add Python alone.
FILES = ("test_ms_deform_attn.py", "test_dcnv3.py", "test_upsample_argmax.py", "test_op_input.py")


def build(folder: Path) -> Path:
    """A library like the installed one, slower and watchful."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    flags = ["-std=c++20", "-O0", "-fPIC", "-fopenmp", "-Wno-psabi", "-fvisibility=hidden", *SANITIZERS]
    if torch._C._GLIBCXX_USE_CXX11_ABI:
        flags.append("-D_GLIBCXX_USE_CXX11_ABI=1")
    sources = sorted([*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc" / "cpu").glob("*.cpp")])
    objects = [str(folder / f"{source.stem}.o") for source in sources]

    def compile_one(source: Path, target: str) -> None:
        subprocess.run([compiler, *flags, *include, "-c", str(source), "-o", target], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    library = folder / "_C_sanitized.so"
    folders = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries = ["-lc10", "-ltorch", "-ltorch_cpu", "-fopenmp"]
    subprocess.run([compiler, "-shared", *SANITIZERS, *objects, *folders, *libraries, "-o", str(library)], check=True)
    return library


@pytest.mark.slow
@pytest.mark.parametrize("kinds", ["thread", "address,undefined"])
def test_kernels_alone_on_one_thread_and_on_several(tmp_path: Path, kinds: str) -> None:
    """Without torch, whose threads would have to be built with the thread sanitizer to be understood by it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    watch = (f"-fsanitize={kinds}", "-fno-sanitize-recover=all")
    level = "-O1" if kinds == "thread" else "-O0"  # the quicker to build
    flags = ["-std=c++20", level, "-g1", "-Wno-psabi", f"-I{ROOT / 'csrc' / 'cpu'}", *watch]
    sources = [ROOT / "tests" / "ops" / "thread_races.cpp", *sorted((ROOT / "csrc" / "cpu").glob("isa_*.cpp"))]
    objects = [str(tmp_path / f"{source.stem}.o") for source in sources]
    for source, target in zip(sources, objects, strict=True):
        subprocess.run([compiler, *flags, "-c", str(source), "-o", target], check=True)
    program = str(tmp_path / "thread_races")
    subprocess.run([compiler, *watch, *objects, "-o", program], check=True)
    found = subprocess.run([program], capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in found.stderr:
        pytest.skip("the thread sanitizer does not know this system's memory layout")
    assert found.returncode == 0, found.stdout + found.stderr[-6000:]
    assert "baseline passed" in found.stdout


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    library = build(tmp_path)
    # The C++ runtime must be there before the sanitizer, which else stops at the first exception of any library.
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "THE_MASK_OPS_LIBRARY": str(library),
        "LD_PRELOAD": " ".join(runtimes),
        # Python and torch keep memory to the end.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/ops/{name}" for name in FILES)]
    found = subprocess.run(
        [*command, "-m", "not slow", "-k", "(compiled or kernel or threads or input) and not compiled_function"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, (found.stdout + found.stderr)[-6000:]
    assert " passed" in found.stdout


@pytest.mark.skipif(not hasattr(torch.ops.the_mask_kernels, "dcnv3_forward"), reason="the extension is not built")
def test_checks_of_shapes_cannot_be_switched_off(tmp_path: Path) -> None:
    """What memory safety rests on is checked in a release build, without assertions, whatever a variable says."""
    code = """
import torch
from the_mask.ops import dcnv3, ms_deform_attn
kernels = torch.ops.the_mask_kernels
calls = [
    lambda: kernels.ms_deform_attn_forward(torch.zeros(1, 6, 1, 4), [2, 2], None, torch.zeros(1, 1, 1, 1, 1, 2),
                                           torch.zeros(1, 1, 1, 1, 1)),
    lambda: kernels.ms_deform_attn_forward(torch.zeros(1, 4, 1, 4), [2, 2], None, torch.zeros(1, 1, 1, 1, 1, 2),
                                           torch.zeros(1, 2, 1, 1, 1)),
    lambda: kernels.dcnv3_forward(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 18), torch.zeros(1, 4, 3, 9), None,
                                  [3, 3], [1, 1], [1, 1], [1, 1], 1, 1.0, False),
    lambda: kernels.dcnv3_backward(torch.zeros(1, 4, 3, 4), torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 18),
                                   torch.zeros(1, 4, 4, 9), None, [3, 3], [1, 1], [1, 1], [1, 1], 1, 1.0, False, False),
    lambda: ms_deform_attn(torch.zeros(1, 5, 1, 4), [(2, 2)], None, torch.zeros(1, 1, 1, 1, 1, 2),
                           torch.zeros(1, 1, 1, 1, 1)),
    lambda: dcnv3(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 17), torch.zeros(1, 4, 4, 9), 3, padding=1),
]
for number, call in enumerate(calls):
    try:
        call()
    except (RuntimeError, ValueError) as error:
        print("refused", type(error).__name__)
"""
    environment = {**os.environ, "THE_MASK_DEBUG": "0", "PYTHONOPTIMIZE": "2", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert found.stdout.count("refused") == 6, found.stdout + found.stderr
