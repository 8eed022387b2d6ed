"""Compare the CPU kernels with the limits of the machine: bytes, operations, and the share of the roofline reached.

    python benchmarks/bench_roofline.py                      # AVX2 and AVX-512, one and two threads
    python benchmarks/bench_roofline.py --codes AVX2 --threads 1 --process-time

The roof of an operator is the larger of two times: every argument read once and the output written once, at the
bandwidth of a large copy; and every multiply-add, at the rate of a matrix product. Both rates are measured in the same
run, with the same number of threads. Backward is not in the table: its least traffic depends on where the points fall.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from common import bandwidth, machine, multiply_adds, write_json
from op_contenders import LEVELS, STAGES, Problem, encoder_problem, stage_problem
from timing import race

from the_mask.ops import upsample_argmax, use
from the_mask.ops.extension import missing_for

LABELS = {"labels 124": (124, (480, 864), 4), "labels 19": (19, (480, 864), 4)}


class Case:
    """A call of an operator, with its minimum number of bytes and operations."""

    def __init__(self, name: str, call: Callable[[], object], moved: int, products: int) -> None:
        self.name, self.call, self.moved, self.products = name, call, moved, products


def cases(only: str) -> Iterator[Case]:
    """Deformable attention, DCNv3 and label maps at the sizes of 480p video."""
    cpu = torch.device("cpu")
    makers: dict[str, Callable[[], Problem]] = {
        f"msda {size}": partial(encoder_problem, size, 1, "realistic", torch.float32, cpu) for size in LEVELS
    }
    makers |= {f"dcnv3 {stage}": partial(stage_problem, stage, torch.float32, cpu) for stage in STAGES}
    for name, make in makers.items():
        if only in name:
            problem = make()
            yield Case(name, problem.forward("compiled"), problem.bytes_moved, problem.multiply_adds)
    for name, (classes, size, stride) in LABELS.items():
        if only in name:
            scores = torch.randn(classes, size[0] // stride, size[1] // stride)
            pixels = size[0] * size[1]
            # Rows are interpolated once per row of labels, then every pixel along the row.
            products = 2 * classes * (size[0] * scores.shape[2] + pixels)

            def call(scores: torch.Tensor = scores, size: tuple[int, int] = size, stride: int = stride) -> object:
                return upsample_argmax(scores, size, size, stride)

            yield Case(name, call, scores.numel() * 4 + pixels, products)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times and shares by threads, case and instruction set."""
    kernels = torch.ops.the_mask_kernels
    report: dict[str, Any] = {"machine": machine(), "clock": "process" if args.process_time else "wall"}
    clock = time.process_time if args.process_time else time.perf_counter
    for threads in args.threads:
        torch.set_num_threads(threads)
        rates = {
            "bytes_per_second": bandwidth(threads, clock),
            "multiply_adds_per_second": multiply_adds(threads, clock),
        }
        print(
            f"{threads} thread(s): {rates['bytes_per_second'] / 1e9:.1f} GB/s, "
            f"{rates['multiply_adds_per_second'] / 1e9:.1f} G multiply-adds/s"
        )
        rows: dict[str, Any] = {}
        for case in cases(args.only):

            def forced(code: str, call: Callable[[], object] = case.call) -> Callable[[], object]:
                def run() -> object:
                    kernels.force_cpu_capability(code)
                    with use("compiled"):
                        return call()

                return run

            try:
                calls = {code: forced(code) for code in args.codes}
                times = race(calls, args.rounds, torch.device("cpu"), seconds_per_turn=0.05, clock=clock)
            finally:
                kernels.force_cpu_capability("auto")
            by_memory = case.moved / rates["bytes_per_second"]
            by_arithmetic = case.products / rates["multiply_adds_per_second"]
            row: dict[str, Any] = {
                "bytes": case.moved,
                "multiply_adds": case.products,
                "roof_ms": 1e3 * max(by_memory, by_arithmetic),
                "bound_by": "memory" if by_memory > by_arithmetic else "arithmetic",
            }
            for code, values in times.items():
                seconds = statistics.median(values)
                row[code] = {"ms": 1e3 * seconds, "share": max(by_memory, by_arithmetic) / seconds}
            rows[case.name] = row
            shares = ", ".join(f"{c} {row[c]['ms']:.2f} ms = {row[c]['share']:.0%}" for c in args.codes)
            print(
                f"  {case.name:14s} {case.moved / 1e6:7.1f} MB {case.products / 1e6:8.1f} M  "
                f"roof {row['roof_ms']:.2f} ms ({row['bound_by']})  {shares}",
                flush=True,
            )
        report[f"threads_{threads}"] = {"rates": rates, "cases": rows}
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--codes", nargs="+", default=["AVX2", "AVX-512"], metavar="SET")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--process-time", action="store_true", help="count the process's own time: one thread on a busy machine"
    )
    args = parser.parse_args()
    missing = missing_for("cpu")
    if missing is not None:
        parser.error(f"the CPU kernels are not there: {missing}")
    if args.process_time and args.threads != [1]:
        parser.error("--process-time adds up the threads' time; use it with --threads 1")
    report = measure(args)
    write_json("roofline_cpu", report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
