"""Builds the compiled kernels; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.errors import CCompilerError, ExecError

ROOT = Path(__file__).resolve().parent

# THE_MASK_BUILD: "off" no kernels (pure Python, works everywhere), "cpu" CPU kernels, "cuda" CPU and CUDA kernels,
# "auto" (default) what this machine can build. What is asked for by name must build; auto falls back with a notice.
BUILD_MODES = ("auto", "off", "cpu", "cuda")
BUILD_ERRORS = (RuntimeError, OSError, CCompilerError, ExecError, subprocess.CalledProcessError)
CUDA_ARCHITECTURES = "8.0;9.0+PTX"  # unless TORCH_CUDA_ARCH_LIST says otherwise


def notice(text: str) -> None:
    """Print a message during installation (pip shows it with -v)."""
    print(f"the_mask: {text}", file=sys.stderr)


def build_mode() -> str:
    """THE_MASK_BUILD, checked."""
    mode = os.environ.get("THE_MASK_BUILD") or "auto"
    if mode not in BUILD_MODES:
        raise SystemExit(f"THE_MASK_BUILD={mode}: expected one of {', '.join(BUILD_MODES)}")
    return mode


def cuda_toolkit_problem() -> str | None:
    """Why CUDA kernels cannot be built with the torch installed here; None if they can. Sets an unset CUDA_HOME."""
    spec = importlib.util.spec_from_file_location("cuda_check", ROOT / "csrc" / "cuda_check.py")
    assert spec is not None
    assert spec.loader is not None
    cuda_check = sys.modules["cuda_check"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cuda_check)
    toolkit = cuda_check.find_toolkit()
    problem: str | None = cuda_check.why_not(toolkit)
    if problem is None:
        # torch takes the folder above nvcc's, which is wrong where the nvcc on the path is a script.
        os.environ.setdefault("CUDA_HOME", str(toolkit))
    return problem


def make_extension(with_cuda: bool) -> Extension:
    """The extension the_mask.ops._C: a plain library of torch operators, without a Python binding."""
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    def sources(*patterns: str) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))

    # The kernels are written for contraction to fused multiply-add; -g0 halves the build time.
    flags = {"cxx": ["-O3", "-g0", "-ffp-contract=fast", "-Wno-psabi", "-fvisibility=hidden"]}
    arguments: dict[str, Any] = {
        "name": "the_mask.ops._C",
        "sources": sources("*.cpp", "cpu/*.cpp", *(["cuda/*.cpp", "cuda/*.cu"] if with_cuda else [])),
        "depends": sources("*.h", "cpu/*.h", "cpu/*.inc", "cuda/*.h", "cuda/*.cuh"),
        "extra_compile_args": flags,
        "define_macros": [("THE_MASK_CUDA_VERSION", torch.version.cuda)] if with_cuda else [],
        "py_limited_api": True,
    }
    if sys.platform == "linux" and torch.backends.openmp.is_available():
        # Without it, at::parallel_for is silently a plain loop.
        flags["cxx"].append("-fopenmp")
        arguments["extra_link_args"] = ["-fopenmp"]
    if not with_cuda:
        return CppExtension(**arguments)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    arguments["define_macros"].append(("THE_MASK_WITH_CUDA", None))
    flags["nvcc"] = ["-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fvisibility=hidden"]
    flags["nvcc"] += ["-Xfatbin", "-compress-all"]
    return CUDAExtension(**arguments)


def extension_arguments() -> dict[str, Any]:
    """ext_modules and cmdclass for this machine and THE_MASK_BUILD."""
    mode = build_mode()
    if mode == "off":
        return {}
    try:
        import torch  # noqa: F401
    except ImportError as error:
        if mode != "auto":
            raise SystemExit(
                f"THE_MASK_BUILD={mode} needs torch at build time ({error}): install torch first, then run pip with "
                "--no-build-isolation"
            ) from error
        notice("torch is not importable here, so no kernels are built (install it first, use --no-build-isolation)")
        return {}
    if os.name == "nt":
        if mode != "auto":
            raise SystemExit(f"THE_MASK_BUILD={mode}: the kernels need GCC or Clang; on Windows use THE_MASK_BUILD=off")
        notice("no kernels on Windows: the portable PyTorch path runs")
        return {}
    problem = None if mode == "cpu" else cuda_toolkit_problem()
    if mode == "cuda" and problem is not None:
        raise SystemExit(f"THE_MASK_BUILD=cuda: {problem}")
    if mode == "auto" and problem is not None:
        notice(f"CPU kernels only: {problem}")
    with_cuda = mode != "cpu" and problem is None
    # Reads CUDA_HOME when it is imported.
    import torch.utils.cpp_extension as cpp

    class Build(cpp.BuildExtension):
        """BuildExtension that, with "auto", builds fewer kernels when a compiler fails."""

        def run(self) -> None:
            try:
                super().run()
            except BUILD_ERRORS as error:
                if mode != "auto":
                    raise
                self.retry(error)

        def retry(self, error: Exception) -> None:
            if with_cuda:
                notice(f"the CUDA kernels do not build, trying the CPU kernels alone ({error})")
                self.extensions = [make_extension(False)]
                try:
                    super().run()
                    return
                except BUILD_ERRORS as second:
                    error = second
            notice(f"the kernels do not build, the portable PyTorch path runs instead ({error})")
            self.extensions = []
            self.distribution.ext_modules = []

    return {
        "ext_modules": [make_extension(with_cuda)],
        "cmdclass": {"build_ext": Build.with_options(no_python_abi_suffix=True)},
    }


class Wheel(bdist_wheel):
    """A wheel for every Python 3: the kernels are torch operators and use no Python API.

    It is tagged with the platform when it holds kernels, and py3-none-any when none were built.
    """

    def run(self) -> None:
        # Build first: only then is it known whether there are kernels.
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        if self.root_is_pure:
            return "py3", "none", "any"
        return "py3", "none", super().get_tag()[2]


arguments = extension_arguments()
setup(
    # configs/ stays at the top of the source tree and is installed inside the package.
    packages=[*find_namespace_packages(include=["the_mask", "the_mask.*"]), "the_mask.configs"],
    package_dir={"the_mask": "the_mask", "the_mask.configs": "configs"},
    ext_modules=arguments.get("ext_modules"),
    cmdclass={"bdist_wheel": Wheel, **arguments.get("cmdclass", {})},
)
