"""Time the deformable operators: every path, the usual grid_sample core, other peers; memory; a whole model.

    python benchmarks/bench_ops.py                 # everything, 20 to 25 minutes on two quiet cores
    python benchmarks/bench_ops.py --quick         # kernels against the core only, some minutes
    python benchmarks/bench_ops.py --parts memory model

Prints medians with the interquartile range and ratios to the grid_sample core of the same run, compares geometric means
with the goals, and writes ``benchmarks/results/ops_<device>.json`` after every step, so that an interrupted run keeps
its results.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import bandwidth, geometric_mean, machine, multiply_adds, peak_memory, write_json
from op_contenders import LEVELS, STAGES, Problem, encoder_problem, stage_problem
from timing import quartiles, race, ratio

from the_mask.config import load_config
from the_mask.data.clips import Clip
from the_mask.ops import explain, use
from the_mask.ops.extension import missing_for

# Times faster than the grid_sample core, float32, geometric mean over a line: (forward, forward+backward), the goal
# and what is aimed for.
GOALS = {
    "msda realistic": ((28, 23), (34, 28)),
    "msda random": ((12, 9), (20, 13)),
    "dcnv3 T": ((22, 17), (28, 22)),
    "dcnv3 H1-2": ((32, 27), (40, 34)),
}
ROOT = Path(__file__).resolve().parent.parent
QUICK = ("core", "compiled", "scalar CUDA")
# Slow contenders run in few rounds, on one thread, and only on some problems.
SLOW = {"reference", "torch.compile of core"}
SHOWN_SLOW = ("msda 480x853 batch 1 realistic", "msda 240x427 batch 1 random", "dcnv3 T1", "dcnv3 T3", "dcnv3 H2")
MODES = ("forward", "forward_backward")


def problems(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[Problem]:
    """All problems of one dtype whose name contains ``args.only``, in the order of the table."""
    device = torch.device(args.device)
    for size in LEVELS:
        for batch in (1, 2) if dtype == torch.float32 else (1,):
            for kind in ("realistic", "random"):
                if args.only in f"msda {size} batch {batch} {kind}":
                    yield encoder_problem(size, batch, kind, dtype, device)
    for stage in STAGES:
        if args.only in f"dcnv3 {stage}":
            yield stage_problem(stage, dtype, device)


def run_problem(problem: Problem, args: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Times of all contenders, forward and forward+backward."""
    names = [name for name in problem.contenders if not args.quick or name in QUICK]
    if missing_for(args.device) is not None:
        names.remove("compiled")
    if threads > 1 or problem.name not in SHOWN_SLOW:
        names = [name for name in names if name not in SLOW]
    if threads > 1 or "batch 2" in problem.name:
        names = [name for name in names if name != "transformers"]  # the core under another name
    result: dict[str, Any] = {"line": problem.line}
    for mode in MODES:
        calls = {name: getattr(problem, mode)(name) for name in names}
        times = race({n: c for n, c in calls.items() if n not in SLOW}, args.rounds, torch.device(args.device))
        times |= race({n: c for n, c in calls.items() if n in SLOW}, 3, torch.device(args.device))
        rows: dict[str, Any] = {name: quartiles(values) for name, values in times.items()}
        if "core" in times:
            for name, values in times.items():
                # The slow ones ran in rounds of their own.
                base = times["core"] if len(values) == len(times["core"]) else times["core"][: len(values)]
                rows[name]["ratio_to_core"] = ratio(base, values)
        if "scalar CUDA" in times and "compiled" in times:
            rows["compiled"]["ratio_to_scalar_cuda"] = ratio(times["scalar CUDA"], times["compiled"])
            if mode == "forward":
                rows["compiled"]["gb_per_second"] = problem.bytes_moved / (1e6 * rows["compiled"]["median_ms"])
        result[mode] = rows
    return result


def show(name: str, result: dict[str, Any], threads: int) -> None:
    """Print one problem's rows."""
    for mode in MODES:
        print(f"{name}, {mode.replace('_', '+')}, {threads} thread(s)")
        for contender, row in result[mode].items():
            faster = f"  {row['ratio_to_core']:6.2f}x" if "ratio_to_core" in row else ""
            if "ratio_to_scalar_cuda" in row:
                faster += f"  {row['ratio_to_scalar_cuda']:6.2f}x the scalar kernel"
            print(f"    {contender:24s} {row['median_ms']:10.2f} ms  (IQR {row['iqr_ms']:.2f}){faster}", flush=True)


def add_floor(report: dict[str, Any], problem: Problem, result: dict[str, Any], threads: int) -> None:
    """The lower bound for forward on this machine: every byte moved once, every multiply-add at the full rate."""
    floor = report["floor"][f"threads_{threads}"]
    by_memory = problem.bytes_moved / floor["bytes_per_second"]
    by_arithmetic = problem.multiply_adds / floor["multiply_adds_per_second"]
    result["floor"] = {"memory_ms": 1e3 * by_memory, "arithmetic_ms": 1e3 * by_arithmetic}
    if "compiled" in result["forward"]:
        best = 1e3 * max(by_memory, by_arithmetic)
        result["floor"]["forward_over_floor"] = result["forward"]["compiled"]["median_ms"] / best


def summarise(report: dict[str, Any]) -> dict[str, Any]:
    """Geometric means per line of goals, per number of threads, and what a second thread brings."""
    summary: dict[str, Any] = {}
    for threads in report["threads"]:
        lines: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for result in report[f"threads_{threads}"].values():
            for mode in MODES:
                row = result[mode].get("compiled", {})
                if "ratio_to_core" in row:
                    lines[result["line"]][mode].append(row["ratio_to_core"])
        for line, modes in lines.items():
            entry: dict[str, Any] = {mode: round(geometric_mean(values), 1) for mode, values in modes.items()}
            if line in GOALS and report["device"] == "cpu":
                goal, aim = GOALS[line]
                entry["goal"], entry["aim"] = goal, aim
                entry["reached"] = entry["forward"] >= goal[0] and entry["forward_backward"] >= goal[1]
            summary[f"{line}, {threads} thread(s)"] = entry
    if report["threads"] == [1, 2]:
        one, two = report["threads_1"], report["threads_2"]
        for mode in MODES:
            gains = [
                one[name][mode]["compiled"]["median_ms"] / two[name][mode]["compiled"]["median_ms"]
                for name in one
                if name in two and "compiled" in one[name][mode]
            ]
            summary[f"two threads over one, {mode}"] = round(geometric_mean(gains), 2) if gains else None
    return summary


def time_problems(args: argparse.Namespace, report: dict[str, Any], name: str, dtype: torch.dtype) -> None:
    """Time all problems of one dtype with every number of threads; the report is written after each."""
    if args.device == "cpu" and "floor" not in report:
        report["floor"] = {
            f"threads_{t}": {"bytes_per_second": bandwidth(t), "multiply_adds_per_second": multiply_adds(t)}
            for t in args.threads
        }
    for count in args.threads:
        torch.set_num_threads(count)
        for problem in problems(args, dtype):
            result = run_problem(problem, args, count)
            if args.device == "cpu":
                add_floor(report, problem, result, count)
            show(problem.name, result, count)
            report[f"threads_{count}"][problem.name] = result
            report["summary"] = summarise(report)
            write_json(name, report)


MEMORY_CASES = {
    "msda 480x853": lambda: encoder_problem("480x853", 1, "realistic", torch.float32, torch.device("cpu")),
    "dcnv3 T1": lambda: stage_problem("T1", torch.float32, torch.device("cpu")),
    "dcnv3 H1": lambda: stage_problem("H1", torch.float32, torch.device("cpu")),
}


def measure_memory(case: str, contender: str, mode: str) -> None:
    """Entry of the measuring process: print the growth of the process in bytes."""
    problem = MEMORY_CASES[case]()
    small = encoder_problem("240x427", 1, "realistic", torch.float32, torch.device("cpu"))
    getattr(small, mode)(contender)()  # load libraries, start threads
    function = getattr(problem, mode)(contender)
    print(peak_memory(function))


def bench_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak growth of a fresh process during one first call, in MB; results and gradients included."""
    found: dict[str, Any] = {}
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(max(args.threads))}
    for case in MEMORY_CASES:
        problem = MEMORY_CASES[case]()
        output = problem.contenders["compiled"]().numel() * 4 / 1e6
        grads = sum(leaf.numel() * 4 for leaf in problem.leaves) / 1e6
        row: dict[str, Any] = {"output_mb": round(output, 2), "output_and_gradients_mb": round(output + grads, 2)}
        for contender in ("core", "compiled"):
            for mode in MODES:
                command = [sys.executable, __file__, "--measure-memory", case, contender, mode]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                row[f"{contender} {mode}"] = round(int(done.stdout.split()[-1]) / 1e6, 2)
        found[case] = row
        print(f"memory {case}: {row}", flush=True)
    return found


def bench_model(args: argparse.Namespace) -> dict[str, Any]:
    """One frame, and one training step, of Mask2Former R50 on the kernels and on the grid_sample path."""
    from the_mask.modeling import MaskClassifier

    overrides = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", args.device]
    device = torch.device(args.device)
    model = MaskClassifier(load_config(str(ROOT / "configs/vspw/mask2former_r50.yaml"), overrides)).to(device)
    found: dict[str, Any] = {}
    for threads in args.threads:
        torch.set_num_threads(threads)
        rows: dict[str, Any] = {}
        for name, size in (("frame 480x853", (480, 853)), ("training step 240x427", (240, 427))):
            frame = torch.randint(256, (3, *size), dtype=torch.uint8)
            labels = (torch.arange(size[0])[:, None] // 60 * 8 + torch.arange(size[1]) // 110).expand(size)
            clip = Clip([frame], [labels % 124], dataset="random", video_id="0")
            train = name.startswith("training")
            model.train(train)

            def step(path: str, clip: Clip = clip, train: bool = train) -> None:
                with use(path):
                    if not train:
                        with torch.no_grad():
                            model.score_maps([clip])
                        return
                    model.zero_grad(set_to_none=True)
                    sum(model([clip]).values()).backward()

            calls = {path: (lambda path=path: step(path)) for path in ("portable", "compiled")}
            times = race(calls, args.rounds, device)
            rows[name] = {path: quartiles(values) for path, values in times.items()}
            rows[name]["times_faster"] = ratio(times["portable"], times["compiled"])
            print(f"{name}, {threads} thread(s): {rows[name]}", flush=True)
        found[f"threads_{threads}"] = rows
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="float32, kernels and grid_sample core only")
    parser.add_argument(
        "--parts", nargs="+", choices=["times", "memory", "model"], default=["times", "memory", "model"]
    )
    parser.add_argument("--only", default="", help="problems whose name, without the dtype, contains this")
    parser.add_argument("--output", default="", help="name of the JSON file, without its ending")
    parser.add_argument("--measure-memory", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_memory:
        measure_memory(*args.measure_memory)
        return
    threads = args.threads if args.device == "cpu" else [torch.get_num_threads()]
    args.threads = threads
    report: dict[str, Any] = {"machine": machine(), "device": args.device, "threads": threads, "ops": explain()}
    print(report["ops"])
    name = args.output or f"ops_{args.device}"
    report |= {f"threads_{count}": {} for count in threads}
    if "times" in args.parts:
        time_problems(args, report, name, torch.float32)
    if "memory" in args.parts and args.device == "cpu" and missing_for("cpu") is None:
        report["memory_mb"] = bench_memory(args)
        write_json(name, report)
    if "model" in args.parts and missing_for(args.device) is None:
        report["model"] = bench_model(args)
        write_json(name, report)
    if "times" in args.parts:
        if not args.quick:
            time_problems(args, report, name, torch.bfloat16)
        for line, entry in report["summary"].items():
            print(f"{line}: {entry}")
    print(f"written to {write_json(name, report)}")


if __name__ == "__main__":
    main()
