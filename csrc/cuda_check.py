"""Compile and link the CUDA kernels with this machine's nvcc and load the result; needs no GPU.

    python csrc/cuda_check.py [--keep FOLDER]

Prints registers, spills and shared memory of every kernel, and the time it took. Exit status: 0 when the library
builds, links, loads and has registered its operators, or when there is nothing to check with (no nvcc, or none that
goes with torch: "skipped"); 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent
ARCHITECTURES = "8.0;9.0+PTX"
OPERATORS = ("ms_deform_attn_forward", "ms_deform_attn_backward", "dcnv3_forward", "dcnv3_backward", "upsample_argmax")
SOURCES = ("*.cpp", "cpu/*.cpp", "cuda/*.cpp", "cuda/*.cu")
CUDA_FLAGS = ("-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v")


class Kernel(NamedTuple):
    """The report of ptxas on one kernel and architecture; sizes in bytes."""

    architecture: str
    symbol: str
    registers: int
    spills: int
    shared: int


def parse_ptxas(text: str) -> list[Kernel]:
    """Kernels in the output of ``nvcc -Xptxas -v``."""
    found = []
    entry = re.compile(
        r"Compiling entry function '(?P<symbol>\w+)' for '(?P<architecture>\w+)'"
        r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
        r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for match in entry.finditer(text):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found.append(
            Kernel(
                match["architecture"],
                match["symbol"],
                int(match["registers"]),
                int(match["stores"]) + int(match["loads"]),
                int(shared[1]) if shared else 0,
            )
        )
    return found


def demangle(symbols: list[str]) -> list[str]:
    """Readable names, without namespaces and parameters, where there is c++filt."""
    tool = shutil.which("c++filt")
    if tool is None:
        return symbols
    text = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = [line.replace("the_mask::cuda::", "").removeprefix("void ") for line in text.splitlines()]
    return [re.sub(r"\(.*\)$", "", name) for name in names]


def find_toolkit() -> Path | None:
    """Folder of the CUDA toolkit: $CUDA_HOME, else the one of the nvcc on the path, else /usr/local/cuda; or None.

    nvcc itself is asked where it lives, because the one on the path may be a script that calls it, in a folder without
    the toolkit's headers.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return Path(home) if (Path(home) / "bin" / "nvcc").exists() else None
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return None
    plan = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr + plan.stdout, re.MULTILINE)
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1]


def why_not(toolkit: Path | None) -> str | None:
    """Why nothing can be checked here, or None."""
    import torch

    if toolkit is None:
        return "no nvcc on this machine (put it on the path or set CUDA_HOME)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    text = subprocess.run(
        [str(toolkit / "bin" / "nvcc"), "--version"], capture_output=True, text=True, check=True
    ).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        version = release[0] if release else "of an unknown release"
        return f"nvcc is {version}, torch was built with CUDA {torch.version.cuda}: the major versions must be equal"
    return None


def build(folder: Path) -> None:
    """Compile, link and load in this process; the compilers' output goes to stdout.

    The whole extension is built, so that what is linked is what an installation has; its CPU kernels unoptimised, which
    is faster to compile.

    Raises:
        RuntimeError: something does not compile, link, load or register.
    """
    import torch
    from torch.utils.cpp_extension import load

    os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES
    os.environ.setdefault("MAX_JOBS", "1")
    sources = [path for pattern in SOURCES for path in sorted(CSRC.glob(pattern))]
    load(
        name="the_mask_cuda_check",
        sources=[str(source) for source in sources],
        extra_cflags=["-O0", "-Wno-psabi", "-DTHE_MASK_WITH_CUDA"],
        extra_cuda_cflags=list(CUDA_FLAGS),
        extra_ldflags=["-Wl,--no-undefined"],
        build_directory=str(folder),
        is_python_module=False,
        verbose=True,
    )
    for operator in OPERATORS:
        name = f"the_mask_kernels::{operator}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            raise RuntimeError(f"the library loads but registers no CUDA kernel for {name}")
        print(f"registered for CUDA: {getattr(torch.ops.the_mask_kernels, operator).default._schema}")


def report(text: str) -> str:
    """Table of the kernels in the compilers' output."""
    kernels = parse_ptxas(text)
    rows = sorted(zip(demangle([kernel.symbol for kernel in kernels]), kernels, strict=True))
    lines = [f"{'registers':>9} {'spills':>6} {'shared':>6}  kernel"]
    for name, kernel in rows:
        lines.append(f"{kernel.registers:>9} {kernel.spills:>6} {kernel.shared:>6}  {kernel.architecture} {name}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="build here and keep what was built")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)  # the part that runs as a process of its own
    arguments = parser.parse_args()
    if arguments.build:
        build(arguments.build)
        return 0
    toolkit = find_toolkit()
    problem = why_not(toolkit)
    if problem is not None:
        print(f"cuda-check: skipped: {problem}")
        return 0
    with tempfile.TemporaryDirectory(prefix="cuda_check_") as temporary:
        folder = (arguments.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        # A separate process, to capture the compilers' output and to load the library.
        command = [sys.executable, str(Path(__file__).resolve()), "--build", str(folder)]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env=os.environ | {"CUDA_HOME": str(toolkit)},
        )
        seconds = time.monotonic() - begin
    if done.returncode != 0:
        print(done.stdout)
        print(f"cuda-check: FAILED after {seconds:.0f} s (architectures {ARCHITECTURES}); the error is above")
        return 1
    print(report(done.stdout))
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("registered")))
    print(f"cuda-check: compiled for {ARCHITECTURES}, linked and loaded in {seconds:.0f} s; nothing was run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
