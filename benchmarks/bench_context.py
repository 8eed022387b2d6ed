"""Time and memory of context blocks at one feature size, compared with the same blocks on plain ``bmm`` attention.

Every block alternates with its plain variant (the same module and weights; the whole map of logits is made, masked
where the block sees only part of the keys, and multiplied by ``bmm``). Peak memory is that of a separate process.
Parts:

- ``blocks``: forward and forward + backward, peak memory of both, bytes of inputs and outputs;
- ``attention``: the dense attention of ``tma`` compared with that of ``apnb``, including pooling.

    python benchmarks/bench_context.py --size 80 80 --memory-frames 2 4 --threads 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from common import machine, peak_memory, write_json
from timing import quartiles, race, ratio
from torch import Tensor

import the_mask.modeling  # noqa: F401  (fills the registries)
from the_mask.config import load_config
from the_mask.modeling.pixel.context import attention, criss_cross, dense
from the_mask.modeling.pixel.context.registry import CONTEXT_BLOCKS, BlockInputs, ContextBlock, ShapeSpec
from the_mask.modeling.pixel.context.types import ClipFeatures

# Label -> type and options; widths are those of the configs for ResNet-18.
BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "tma": ("tma", {}),
    "apnb cube": ("apnb", {"POOL": "cube"}),
    "apnb clipped": ("apnb", {"POOL": "clipped"}),
    "apnb plane": ("apnb", {"POOL": "plane"}),
    "apnb spatial": ("apnb", {"POOL": "spatial"}),
    "afnb": ("afnb", {}),
    "nonlocal": ("nonlocal", {}),
    "cc2d R=2": ("cc", {"MODE": "cc2d"}),
    "cc_separable R=2": ("cc", {"MODE": "cc_separable"}),
    "cc_query R=2": ("cc", {"MODE": "cc_query"}),
    "cc3d_full R=2": ("cc", {"MODE": "cc3d_full"}),
    "channel": ("channel", {}),
    "ppm": ("ppm", {}),
}
# Blocks without a plain variant, because they have no attention map or it would not fit into memory.
WITHOUT_PLAIN = ("channel", "ppm", "cc3d_full R=2")
CHANNELS, LOW_CHANNELS = 512, 256
PASSES = (("forward", False), ("forward_backward", True))
# Label, memory frames, with the backward pass, plain.
Case = tuple[str, int, bool, bool]


def plain_attend(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """``attention.attend`` with the whole map at once."""
    logits = torch.bmm(query.transpose(1, 2), key) * scale
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None], float("-inf"))
    return torch.bmm(value, logits.softmax(dim=-1).transpose(1, 2))


def plain_cross(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``criss_cross.criss_cross`` as dense attention under a mask."""
    return plain_cross_query(query, key[:, None], value[:, None], None)


def plain_cross_query(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
    """``criss_cross.criss_cross_query`` as dense attention under a mask (all slots valid)."""
    height, width = query.shape[-2:]
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    hidden = (rows[:, None] != rows) & (columns[:, None] != columns)
    hidden = hidden.repeat(1, key.shape[1])
    logits = torch.bmm(query.flatten(2).transpose(1, 2), attention.flatten_slots(key)).masked_fill(
        hidden, float("-inf")
    )
    out = torch.bmm(attention.flatten_slots(value), logits.softmax(dim=-1).transpose(1, 2))
    return out.unflatten(2, (height, width))


@contextmanager
def plain() -> Iterator[None]:
    """Use the plain functions inside the block."""
    with (
        mock.patch.object(dense, "attend", plain_attend),
        mock.patch.object(criss_cross, "criss_cross", plain_cross),
        mock.patch.object(criss_cross, "criss_cross_query", plain_cross_query),
    ):
        yield


def build(label: str, frames: int) -> ContextBlock:
    """A context block in eval mode: fixed batch norm, no dropout."""
    kind, changes = BLOCKS[label]
    cfg = load_config(overrides=["MODEL.SEM_SEG_HEAD.NORM", "BN", "MODEL.CONTEXT.MEMORY_LENGTH", str(frames)])
    options = cfg.MODEL.BLOCKS[kind.upper()].clone()
    options.merge_from_other_cfg(type(options)(changes))
    levels = {"main": ShapeSpec(channels=CHANNELS, stride=8), "res4": ShapeSpec(channels=LOW_CHANNELS, stride=8)}
    torch.manual_seed(0)
    return CONTEXT_BLOCKS.get(kind)(BlockInputs(kind, options, levels, levels, cfg)).eval()


def inputs(size: list[int], frames: int) -> tuple[dict[str, Tensor], ClipFeatures]:
    """A frame and its memory."""
    generator = torch.Generator().manual_seed(1)

    def frame() -> dict[str, Tensor]:
        widths = {"main": CHANNELS, "res4": LOW_CHANNELS}
        return {
            name: torch.randn(1, c, *size, generator=generator).mul_(0.1).requires_grad_() for name, c in widths.items()
        }

    return frame(), ClipFeatures(tuple(frame() for _ in range(frames)), torch.ones(1, frames, dtype=torch.bool))


def contender(label: str, size: list[int], frames: int, backward: bool, is_plain: bool) -> Callable[[], Tensor]:
    """A function that runs the block, with or without the backward pass."""
    block = build(label, frames)
    query, memory = inputs(size, frames)

    def run() -> Tensor:
        with torch.set_grad_enabled(backward):
            if is_plain:
                with plain():
                    feature = block(query, memory).feature
                    if backward:
                        feature.sum().backward()
            else:
                feature = block(query, memory).feature
                if backward:
                    feature.sum().backward()
        return feature.detach()

    return run


def measure_memory(args: argparse.Namespace, cases: list[Case]) -> list[int]:
    """Peak memory growth of a separate process in one call of each case, after a call on a tiny frame."""
    words = [sys.executable, __file__, "--worker", json.dumps({"size": args.size, "cases": cases})]
    # Freed memory is returned to the system at once, so that a case does not reuse memory of the previous one.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(args.threads)}
    result = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def worker(description: str) -> None:
    """Print the peak memory of each case as JSON."""
    task = json.loads(description)
    peaks = []
    for label, frames, backward, is_plain in task["cases"]:
        contender(label, [16, 16], frames, backward, is_plain)()
        peaks.append(peak_memory(contender(label, task["size"], frames, backward, is_plain)))
    print(json.dumps(peaks))


def bytes_of(label: str, size: list[int], frames: int) -> dict[str, int]:
    """Inputs that the block reads, and its output."""
    block = build(label, frames)
    cells = size[0] * size[1] * 4
    reads = sum(CHANNELS if level == "main" else LOW_CHANNELS for level in block.in_levels)
    reads += frames * CHANNELS if block.memory_levels else 0
    return {"inputs": reads * cells, "outputs": block.out_channels * cells}


def twins(label: str) -> list[bool]:
    """Ours (False) and, if there is one, the plain variant (True)."""
    return [False] if label in WITHOUT_PLAIN else [False, True]


def bench_block(args: argparse.Namespace, label: str, frames: int) -> dict[str, Any]:
    """One row: times and ratios of a block and its plain variant."""
    row: dict[str, Any] = {"block": label, "memory_frames": frames, "bytes": bytes_of(label, args.size, frames)}
    for name, backward in PASSES:
        contenders = {str(p): contender(label, args.size, frames, backward, p) for p in twins(label)}
        times = race(contenders, args.rounds, torch.device("cpu"))
        row[name] = quartiles(times["False"])
        if "True" in times:
            row[name]["plain"] = quartiles(times["True"])
            row[name]["times_faster"] = ratio(times["True"], times["False"])
    if len(twins(label)) > 1:
        ours, theirs = (contender(label, args.size, frames, False, p)() for p in twins(label))
        row["largest_difference"] = float((ours - theirs).abs().max())
    return row


def add_memory(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Put peak memory into the rows."""
    cases: list[Case] = [
        (row["block"], row["memory_frames"], backward, p)
        for row in rows
        for _, backward in PASSES
        for p in twins(row["block"])
    ]
    peaks = iter(measure_memory(args, cases))
    for row in rows:
        for name, _ in PASSES:
            for p in twins(row["block"]):
                (row[name]["plain"] if p else row[name])["peak_bytes"] = next(peaks)


def bench_attention(args: argparse.Namespace, frames: int) -> dict[str, Any]:
    """Attention of tma, and pooling and attention of apnb, on keys of width 64 and values of width 256."""
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(1, 64, args.size[0] * args.size[1], generator=generator).mul_(0.1)
    keys, values = (torch.randn(1, frames, c, *args.size, generator=generator).mul_(0.1) for c in (64, 256))
    valid = torch.ones(1, frames, dtype=torch.bool)
    samplers: dict[str, dense.Sampler] = {"tma": dense.sample_all, "apnb": dense.PyramidSampler((1, 3, 6, 8), "cube")}

    def run(name: str, attend: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: attend(query, *samplers[name](keys, values, valid), 1.0)

    with torch.no_grad():
        times = race(
            {
                "tma": run("tma", attention.attend),
                "tma plain": run("tma", plain_attend),
                "apnb": run("apnb", attention.attend),
            },
            args.rounds,
            torch.device("cpu"),
        )
    return {
        "memory_frames": frames,
        **{name: quartiles(values) for name, values in times.items()},
        "apnb_times_faster_than_tma": ratio(times["tma"], times["apnb"]),
        "apnb_times_faster_than_plain_tma": ratio(times["tma plain"], times["apnb"]),
    }


def show(row: dict[str, Any]) -> None:
    """Print one block's row."""
    parts = [f"{row['block']:18s} T={row['memory_frames']}"]
    held = row["bytes"]["inputs"] + row["bytes"]["outputs"]
    for name in ("forward", "forward_backward"):
        result = row[name]
        text = f"{name} {result['median_ms']:8.0f} ms {result['peak_bytes'] / 2**20:6.0f} MiB"
        if "plain" in result:
            text += f" (plain {result['times_faster']:.2f}x, {result['plain']['peak_bytes'] / 2**20:.0f} MiB)"
        parts.append(text)
    print("  ".join(parts), f" inputs and outputs {held / 2**20:.0f} MiB", flush=True)


def main() -> None:
    """Parse, measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[80, 80], help="height and width of the features")
    parser.add_argument("--memory-frames", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS), choices=list(BLOCKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="context", help="of the JSON file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"machine": machine(), "size": args.size, "threads": args.threads, "dtype": "float32"}
    report["attention"] = [bench_attention(args, frames) for frames in args.memory_frames]
    for row in report["attention"]:
        medians = ", ".join(f"{name} {row[name]['median_ms']:.0f} ms" for name in ("tma", "tma plain", "apnb"))
        print(f"attention T={row['memory_frames']}: {medians}: apnb {row['apnb_times_faster_than_tma']:.1f}x")
    report["blocks"] = []
    for label in args.blocks:
        # Image blocks do not look at the memory.
        temporal = bool(build(label, 1).memory_levels)
        for frames in args.memory_frames if temporal else [1]:
            report["blocks"].append(bench_block(args, label, frames))
    add_memory(args, report["blocks"])
    for row in report["blocks"]:
        show(row)
    faster = [r["forward"]["times_faster"] for r in report["blocks"] if "times_faster" in r["forward"]]
    if faster:
        print(f"median over blocks of plain / ours, forward: {statistics.median(faster):.2f}")
    print(write_json(args.name, report))


if __name__ == "__main__":
    main()
