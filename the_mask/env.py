"""Report on the environment: ``python -m the_mask.env`` prints it, training writes it to the log."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from types import ModuleType

import torch
from packaging.requirements import Requirement

import the_mask

PACKAGES = (
    "torchvision",
    "timm",
    "fvcore",
    "iopath",
    "yacs",
    "numpy",
    "scipy",
    "pillow",
    "opencv-python-headless",
    "opencv-python",
    "av",
    "pycocotools",
    "safetensors",
    "tensorboard",
    "transformers",
    "ninja",
)


def detectron2_flavour() -> str:
    """Whether this process imports the ``"embedded"`` or a ``"real"`` ``detectron2``.

    Raises:
        ImportError: there is none (only with ``THE_MASK_D2=real``), or a file ``detectron2.py`` hides it.
    """
    return "embedded" if hasattr(_detectron2(), "__the_mask_embedded__") else "real"


def environment_report() -> str:
    """Return one line per fact, ``name: value``: versions, device, which Detectron2, which kernels, data root.

    Missing or broken parts are reported and never raise, because this is the text for bug reports.
    """
    facts: list[tuple[str, Callable[[], str]]] = [
        ("the_mask", lambda: f"{the_mask.__version__} ({Path(the_mask.__file__).resolve().parent})"),
        ("detectron2", _detectron2_fact),
        ("python", lambda: f"{platform.python_version()} ({sys.executable})"),
        ("platform", platform.platform),
        ("cpu", _cpu_fact),
        ("torch", lambda: f"{torch.__version__} ({Path(torch.__file__).parent})"),
        ("cuda", _cuda_fact),
        ("packages", _packages_fact),
        ("datasets", _datasets_fact),
        ("ops", _ops_fact),
    ]
    width = max(len(name) for name, _ in facts)
    lines = []
    for name, fact in facts:
        try:
            text = fact()
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            text = f"not available: {type(error).__name__}: {error}"
        lines.append(f"{name:<{width}}  " + text.replace("\n", "\n" + " " * (width + 2)))
    return "\n".join(lines)


@dataclass(frozen=True)
class Finding:
    """A problem and what to do about it. ``broken``: something does not work; otherwise it is only slow."""

    text: str
    broken: bool = False


def findings() -> list[Finding]:
    """The findings of ``the-mask doctor`` about this installation; empty if there are none."""
    found = [Finding(text, broken=True) for text in _requirement_problems()]
    if (os.environ.get("THE_MASK_D2") or "auto") == "real" and importlib.util.find_spec("detectron2") is None:
        found.append(Finding("THE_MASK_D2=real, but no Detectron2 is installed: unset it, or install one", broken=True))
    from the_mask.ops.extension import LOADED

    if LOADED.problem is not None:
        found.append(Finding("the compiled kernels do not run, so the slower portable path does: `ops` above says why"))
    if all(_version(name) for name in ("opencv-python", "opencv-python-headless")):
        found.append(Finding("opencv-python and opencv-python-headless overwrite each other: uninstall one of them"))
    if Path("/dev/nvidia0").exists() and not torch.cuda.is_available():
        found.append(
            Finding("there is an NVIDIA device that this torch cannot use: see https://pytorch.org/get-started")
        )
    cores = os.cpu_count() or 1
    if torch.get_num_threads() == 1 and cores > 1:
        found.append(Finding(f"torch uses 1 of {cores} cores; OMP_NUM_THREADS sets the number"))
    if _has_amx():
        found.append(Finding("the CPU has AMX: SOLVER.AMP.ENABLED True MODEL.CHANNELS_LAST True is faster on it"))
    return found


def _requirement_problems() -> list[str]:
    """Required packages that are missing or too old, according to the metadata of the installed the_mask."""
    try:
        lines = requires("the_mask") or []
    except PackageNotFoundError:
        return []  # run from a source tree
    problems = []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None:
            problems.append(f'{requirement.name} is not installed: pip install "{requirement}"')
        elif not requirement.specifier.contains(found, prereleases=True):
            problems.append(f'{requirement.name} is {found}: pip install "{requirement}"')
    return problems


def _has_amx() -> bool:
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and "amx_bf16" in flags.read_text(encoding="utf-8", errors="replace")


def _detectron2() -> ModuleType:
    # Imported here, because with THE_MASK_D2=real there may be none, which the report must say.
    module = importlib.import_module("detectron2")
    if not hasattr(module, "__path__"):
        raise ImportError(f"{getattr(module, '__file__', 'a module')} hides the package detectron2: rename or move it")
    return module


def _detectron2_fact() -> str:
    module = _detectron2()
    mode = os.environ.get("THE_MASK_D2") or "auto"
    return f"{detectron2_flavour()} {getattr(module, '__version__', '?')} ({module.__path__[0]}), THE_MASK_D2={mode}"


def _cpu_fact() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores, {capability}, {torch.get_num_threads()} torch threads"


def _cuda_fact() -> str:
    if not torch.cuda.is_available():
        built = f"torch built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch built without CUDA"
        return f"no device ({built})"
    lines = [f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        lines.append(f"{index}: {device.name}, {memory:.0f} GiB, compute capability {device.major}.{device.minor}")
    return "\n".join(lines)


def _packages_fact() -> str:
    return ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _datasets_fact() -> str:
    from the_mask.data.datasets import dataset_root

    root = dataset_root().absolute()
    origin = "DETECTRON2_DATASETS" if os.environ.get("DETECTRON2_DATASETS") else "default; set DETECTRON2_DATASETS"
    return f"{root} ({origin}{'' if root.is_dir() else '; does not exist'})"


def _ops_fact() -> str:
    from the_mask.ops import explain

    return explain()


if __name__ == "__main__":
    print(environment_report())
