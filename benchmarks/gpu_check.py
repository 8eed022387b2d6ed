#!/usr/bin/env python3
"""Check the CUDA kernels on a GPU: build, tests, sanitizer, training, several GPUs, and a benchmark table.

    make gpu-check                                   # or: python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --device cpu      # everything that can be run without a GPU

Needs torch (2.9 or newer) and numpy, nothing else; for the kernels an nvcc of the major version of torch's CUDA and a
C++ compiler. Takes under ten minutes and writes one JSON file. What cannot run here is left out with the reason; the
exit status is 1 when something failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import torch  # noqa: E402

PARTS = ("build", "tests", "opcheck", "accuracy", "sanitizer", "training", "debug_config", "ddp", "fsdp2", "benchmark")
# Time limit of a part in seconds; most of it is needed for building the CUDA kernels.
LIMITS = {"build": 360, "tests": 90, "sanitizer": 90, "debug_config": 60, "benchmark": 60}
# Where the report may be sent.
SEND = "open an issue of the project with this file and one line on the machine"


class SkippedError(Exception):
    """A part that cannot run here, with the reason."""


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, GPUs and compilers."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "nvcc": _output("nvcc", "--version"),
        "driver": _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
    }
    if device.type == "cuda":
        facts["gpus"] = [
            f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
            for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
    return facts


def _output(*command: str) -> str | None:
    """What a program prints, or None without it."""
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def build(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Build the extension in place; a fresh process, because this one must load the result."""
    if args.no_build:
        raise SkippedError("--no-build")
    mode = "cuda" if device.type == "cuda" else "cpu"
    environment = {**os.environ, "THE_MASK_BUILD": mode}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        environment.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMITS["build"], check=False
    )
    tail = (done.stdout + done.stderr).splitlines()[-40:]
    return {"passed": done.returncode == 0, "log": tail if done.returncode else tail[-3:]}


def tests(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The tests of the CUDA kernels against the float64 oracle."""
    from plain_tests import run_tests

    os.environ["THE_MASK_TEST_DEVICE"] = device.type
    outcomes = run_tests(ROOT / "tests" / "ops" / "test_cuda_kernels.py", LIMITS["tests"])
    failed = [outcome._asdict() for outcome in outcomes if outcome.result == "failed"]
    counts = {result: sum(o.result == result for o in outcomes) for result in ("passed", "failed", "skipped")}
    skipped = sorted({outcome.message for outcome in outcomes if outcome.result == "skipped"})
    passed = not failed and counts["passed"] > 0
    return {"passed": passed, "counts": counts, "failures": failed[:20], "why_skipped": skipped}


def opcheck(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """torch.library.opcheck of the three operators."""
    import the_mask.ops  # noqa: F401  registers them

    value, levels, locations, weights = _attention(device, torch.float32)
    x, offset, mask = _convolution(device, torch.float32)
    sizes = [size for level in levels for size in level]
    library = torch.ops.the_mask
    calls = {
        "ms_deform_attn": (library.ms_deform_attn.default, (value, sizes, locations, weights)),
        "dcnv3": (library.dcnv3.default, (x, offset, mask, None, [3, 3], [1, 1], [1, 1], [1, 1], 4, 1.0, False)),
        "upsample_argmax": (
            library.upsample_argmax.default,
            (torch.randn(5, 8, 9, device=device), [32, 36], [40, 41], 4),
        ),
    }
    found = {name: torch.library.opcheck(operator, given) for name, (operator, given) in calls.items()}
    return {"passed": True, "checks": {name: sorted(checks) for name, checks in found.items()}}


def _attention(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, list[tuple[int, int]], Any, Any]:
    generator = torch.Generator().manual_seed(5)
    levels = [(12, 17), (6, 9)]
    positions = sum(h * w for h, w in levels)
    value = torch.randn(2, positions, 8, 32, generator=generator).to(dtype)
    locations = torch.rand(2, 50, 8, 2, 4, 2, generator=generator) * 1.2 - 0.1
    weights = torch.randn(2, 50, 8, 8, generator=generator).softmax(-1).view(2, 50, 8, 2, 4)
    value, locations, weights = (t.to(device).requires_grad_() for t in (value, locations, weights))
    return value, levels, locations, weights


def _convolution(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, 14, 19, 64, generator=generator).to(dtype)
    offset = torch.randn(2, 14, 19, 4 * 18, generator=generator)
    mask = torch.randn(2, 14, 19, 4, 9, generator=generator).softmax(-1).flatten(3)
    x, offset, mask = (t.to(device).requires_grad_() for t in (x, offset, mask))
    return x, offset, mask


def accuracy(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Largest error of outputs and gradients by dtype, relative to the largest value, against the float64 oracle."""
    from the_mask.ops import dcnv3, ms_deform_attn, use

    tolerances = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-10}
    report: dict[str, Any] = {"passed": True}
    for dtype, tolerance in tolerances.items():
        value, levels, locations, weights = _attention(device, dtype)
        x, offset, mask = _convolution(device, dtype)
        cases: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
            "ms_deform_attn": (lambda v, p, w, s=levels: ms_deform_attn(v, s, None, p, w), (value, locations, weights)),
            "dcnv3": (lambda a, o, m: dcnv3(a, o, m, 3, 1, 1, 1, 4, 1.0), (x, offset, mask)),
        }
        for name, (function, leaves) in cases.items():
            with use("compiled"):
                output = function(*leaves)
            grad = torch.linspace(-1, 1, output.numel(), device=device).view(output.shape).to(output.dtype)
            found = [output, *torch.autograd.grad(output, leaves, grad)]
            doubles = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
            with use("reference"):
                right = function(*doubles)
            expected = [right, *torch.autograd.grad(right, doubles, grad.cpu().double())]
            errors = [
                float((a.detach().cpu().double() - b.detach()).abs().max() / b.detach().abs().max())
                for a, b in zip(found, expected, strict=True)
            ]
            key = f"{name}, {str(dtype).removeprefix('torch.')}"
            report[key] = {"output": errors[0], "gradients": errors[1:], "tolerance": tolerance}
            report["passed"] &= max(errors) <= tolerance
    return report


def sanitizer(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """compute-sanitizer's memcheck over forward and backward of the operators."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if device.type != "cuda":
        raise SkippedError("needs a GPU")
    if not Path(program).exists():
        raise SkippedError("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    command = [program, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(Path(__file__).resolve())]
    done = subprocess.run(
        [*command, "--only", "accuracy", "--no-build", "--output", os.devnull],
        capture_output=True,
        text=True,
        timeout=LIMITS["sanitizer"],
        check=False,
    )
    return {"passed": done.returncode == 0, "log": (done.stdout + done.stderr).splitlines()[-15:]}


def training(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """A small training against committed losses."""
    from gpu_training import check_training

    return check_training(device)


def debug_config(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The golden run of the debug configs (both stages of THE-Mask) here; needs the library's dependencies."""
    missing = [
        name
        for name in ("pytest", "fvcore", "iopath", "yacs", "scipy", "cv2", "PIL", "tabulate", "timm", "tensorboard")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise SkippedError(f"the trainer needs {', '.join(missing)}: pip install -e '.[dev]'")
    environment = {**os.environ, "THE_MASK_TEST_DEVICE": device.type, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/engine/test_golden.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMITS["debug_config"] * (1 if device.type == "cuda" else 10),
        check=False,
    )
    return {"passed": done.returncode == 0, "log": done.stdout.splitlines()[-25:]}


def parallel(kind: str) -> Callable[[torch.device, argparse.Namespace], dict[str, Any]]:
    """Part that trains on several processes."""

    def run(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
        from gpu_training import check_parallel

        if not torch.distributed.is_available():
            raise SkippedError("this torch has no torch.distributed")
        with tempfile.TemporaryDirectory() as folder:
            return check_parallel(device, kind, Path(folder))

    return run


def benchmark(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the kernels, of the grid_sample formulation and (on a GPU) of scalar kernels as published."""
    from op_contenders import Problem, encoder_problem, stage_problem
    from timing import quartiles, race, ratio

    end = time.monotonic() + LIMITS["benchmark"]
    makers: dict[str, Callable[[torch.dtype], Problem]] = {
        "msda": lambda dtype: encoder_problem("480x853", 1, "realistic", dtype, device),
        "msda, small": lambda dtype: encoder_problem("240x427", 1, "realistic", dtype, device),
        "dcnv3 T1": lambda dtype: stage_problem("T1", dtype, device),
        "dcnv3 H2": lambda dtype: stage_problem("H2", dtype, device),
    }
    table: dict[str, Any] = {}
    for title, make in makers.items():
        for dtype in (torch.float32, torch.bfloat16):
            if time.monotonic() > end:
                table.setdefault("left_out", []).append(f"{title} {dtype}")
                continue
            problem = make(dtype)
            names = [name for name in ("compiled", "core", "scalar CUDA") if name in problem.contenders]
            for mode in ("forward", "forward_backward"):
                calls: dict[str, Callable[[], object]] = {name: getattr(problem, mode)(name) for name in names}
                times = race(calls, args.rounds, device)
                row: dict[str, Any] = {name: quartiles(values)["median_ms"] for name, values in times.items()}
                for peer in names[1:]:
                    row[f"times faster than {peer}"] = ratio(times[peer], times["compiled"])
                if mode == "forward":
                    row["gb_per_second"] = problem.bytes_moved / (1e6 * row["compiled"])
                table[f"{problem.name}, {mode.replace('_', '+')}"] = row
    return {"passed": True, "table": table}


RUNNERS: dict[str, Callable[[torch.device, argparse.Namespace], dict[str, Any]]] = {
    "build": build,
    "tests": tests,
    "opcheck": opcheck,
    "accuracy": accuracy,
    "sanitizer": sanitizer,
    "training": training,
    "debug_config": debug_config,
    "ddp": parallel("ddp"),
    "fsdp2": parallel("fsdp2"),
    "benchmark": benchmark,
}


def run_part(name: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """One part's report; an error is part of it."""
    start = time.monotonic()
    try:
        report = RUNNERS[name](device, args)
    except SkippedError as reason:
        report = {"passed": None, "skipped": str(reason)}
    except Exception as error:  # noqa: BLE001  one part that breaks must not hide what the others find
        last = traceback.format_exc().strip().splitlines()[-25:]
        report = {"passed": False, "error": f"{type(error).__name__}: {error}", "traceback": last}
    return {**report, "seconds": round(time.monotonic() - start, 1)}


def describe(name: str, report: dict[str, Any]) -> str:
    """One line of text."""
    state = {True: "passed", False: "FAILED", None: "not run"}[report["passed"]]
    more = report.get("skipped") or report.get("error") or ""
    if "counts" in report:
        more = ", ".join(f"{count} {result}" for result, count in report["counts"].items())
    return f"{name:13s} {state:8s} {report['seconds']:6.1f} s  {more}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument("--no-build", action="store_true", help="take the extension that is there")
    parser.add_argument("--rounds", type=int, default=5, help="of the benchmark (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"), metavar="JSON")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU (torch.cuda.is_available() is false); --device cpu runs what can be run without one")
        return 1
    report: dict[str, Any] = {"device": device.type, "environment": environment(device), "parts": {}}
    for name in PARTS:
        if name not in args.only:
            continue
        part = run_part(name, device, args)
        report["parts"][name] = part
        print(describe(name, part), flush=True)
        if name == "build":
            from the_mask.ops import explain

            report["operators"] = explain()
        if args.output != Path(os.devnull):
            args.output.write_text(json.dumps(report, indent=1) + "\n")
    for title, row in report["parts"].get("benchmark", {}).get("table", {}).items():
        if isinstance(row, dict):
            print(f"  {title}: " + ", ".join(f"{key} {value:.3g}" for key, value in row.items()))
    failed = [name for name, part in report["parts"].items() if part["passed"] is False]
    print(f"\n{'FAILED: ' + ', '.join(failed) if failed else 'everything that ran passed'}")
    if args.output != Path(os.devnull):
        print(f"{args.output.resolve()} holds all of it: {SEND}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
