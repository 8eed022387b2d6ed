"""Whole networks at 480x853: seconds per frame, peak memory, parameters, next to Hugging Face and torchvision.

  python benchmarks/bench_models.py --quick    # the goal: ours against Hugging Face's Mask2Former, R50 and Swin-T
  python benchmarks/bench_models.py            # also every backbone with every head, and DeepLabV3
  python benchmarks/bench_models.py --quick --modes eager auto    # ours prepared, too: the_mask.load's default
  python benchmarks/bench_models.py --modes eager channels_last compile bf16 --device cuda

Every candidate runs in a separate process. To measure time, the processes alternate frame by frame, so that the load of
the machine affects all of them; a ratio is the median of the rounds' ratios. To measure memory, each runs alone, with
an allocator that returns freed memory at once. The time is that of the network, from a normalised frame to class and
mask logits (or class logits). Hugging Face's models have the same random weights, written by its ``save_pretrained``
and read by our converter, and the outputs are compared before timing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from common import RESULTS, machine
from tabulate import tabulate
from timing import ratio

CLASSES = 150
GOAL_SPEED, GOAL_MEMORY, TOLERANCE = 2.0, 0.9, 1e-4
# Of mode "auto": each part in the fastest runtime, whose results may differ a little more.
GOAL_PREPARED, PREPARED_TOLERANCE = 3.0, 1e-3
MODES = ("eager", "channels_last", "compile", "bf16", "auto")
PEERED = ("r50", "swin_t")
BACKBONES: dict[str, list[Any]] = {
    "r50": ["MODEL.RESNETS.NORM", "FrozenBN"],
    "swin_t": [
        *("MODEL.BACKBONE.NAME", "build_timm_backbone"),
        *("MODEL.TIMM.NAME", "swin_tiny_patch4_window7_224"),
        *("MODEL.TIMM.OUT_NORM", "LN"),
    ],
    "convnext_t": ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "convnext_tiny"],
    "mit_b2": ["MODEL.BACKBONE.NAME", "build_mit_backbone", "MODEL.MIT.VARIANT", "B2"],
    "internimage_t": ["MODEL.BACKBONE.NAME", "build_internimage_backbone", "MODEL.INTERNIMAGE.VARIANT", "T"],
}
HEADS: dict[str, list[Any]] = {
    "mask2former": [],
    "upernet": [
        *("MODEL.META_ARCHITECTURE", "ClipSegmentor", "MODEL.SEM_SEG_HEAD.NAME", "UperNetHead"),
        *("MODEL.SEM_SEG_HEAD.NORM", "BN", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 512),
    ],
}


@dataclass(frozen=True)
class Candidate:
    """The model that one process runs.

    Attributes:
        program: "the_mask", "huggingface" or "torchvision".
        backbone: key of :data:`BACKBONES`.
        head: key of :data:`HEADS`, or "deeplabv3".
        mode: one of :data:`MODES`.
        weights: folder of ``save_pretrained``; "" for random weights.
    """

    program: str
    backbone: str
    head: str
    mode: str
    weights: str = ""

    def __str__(self) -> str:
        return f"{self.program} {self.head} {self.backbone} {self.mode}"


# In the process of a candidate.


def huggingface_model(backbone: str) -> Any:
    """Hugging Face's Mask2Former with non-trivial random weights: non-zero offsets, norms with effect."""
    import transformers

    stages = [f"stage{i}" for i in range(1, 5)]
    kind: Any = transformers.SwinConfig if backbone == "swin_t" else transformers.ResNetConfig
    config = transformers.Mask2FormerConfig(backbone_config=kind(out_features=stages))
    config.num_labels = CLASSES
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()


def our_model(candidate: Candidate) -> torch.nn.Module:
    """A segmentor with random weights, or with those of a Hugging Face folder."""
    from the_mask.config import load_config
    from the_mask.modeling.build import build_segmentor
    from the_mask.weights import trained

    options: list[Any] = ["MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", CLASSES]
    cfg = load_config(None, [*options, *HEADS[candidate.head], *BACKBONES[candidate.backbone]])
    if candidate.weights:
        return trained(cfg, weights=Path(candidate.weights) / "model.safetensors")
    return build_segmentor(cfg).eval()


class Network(torch.nn.Module):
    """Frame [1,3,H,W] -> tuple of logits, for any candidate."""

    def __init__(self, candidate: Candidate) -> None:
        super().__init__()
        self.program, self.head = candidate.program, candidate.head
        if candidate.program == "the_mask":
            self.model: Any = our_model(candidate)
        elif candidate.program == "huggingface":
            import transformers

            self.model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(candidate.weights)
        else:
            import torchvision

            self.model = torchvision.models.segmentation.deeplabv3_resnet50(
                weights=None, weights_backbone=None, num_classes=CLASSES
            )
        self.eval()

    def forward(self, frame: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.program == "huggingface":
            found = self.model(pixel_values=frame)
            return found.class_queries_logits, found.masks_queries_logits
        if self.program == "torchvision":
            return (self.model(frame)["out"],)
        features = self.model.backbone(frame)
        if self.head == "mask2former":
            found = self.model.sem_seg_head(features)
            return found["pred_logits"], found["pred_masks"].squeeze(2)
        return (self.model.sem_seg_head(features).logits,)


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (highest) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def serve(candidate: Candidate, args: argparse.Namespace) -> None:
    """Build the network, then answer the commands on stdin, one JSON line each: run, save PATH."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    import the_mask.engine  # noqa: F401  (part of the base line of memory, as transformers is)

    if candidate.program == "huggingface":
        from transformers import Mask2FormerForUniversalSegmentation  # noqa: F401
    gc.collect()
    empty = resident("VmRSS")
    network = Network(candidate)
    # Copy the weights: a memory-mapped file would not be counted until it is read.
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    network.to(device)
    frame = torch.randn(1, 3, args.height, args.width, generator=torch.Generator().manual_seed(1)).to(device)
    if candidate.mode == "channels_last":
        network, frame = network.to(memory_format=torch.channels_last), frame.to(memory_format=torch.channels_last)
    run: Any = torch.compile(network) if candidate.mode == "compile" else network
    chosen: object = ""
    if candidate.mode == "auto":
        from the_mask.inference.runtimes import use_runtime

        chosen = use_runtime(network.model, "auto")
    bf16 = candidate.mode == "bf16"
    gc.collect()

    def once() -> tuple[torch.Tensor, ...]:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found = run(frame)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return found

    if args.memory:
        Path("/proc/self/clear_refs").write_text("5")
    else:
        once()
    parameters = sum(p.numel() for p in network.parameters())
    print(json.dumps({"parameters": parameters, "chosen": str(chosen)}), flush=True)
    for line in sys.stdin:
        command, _, path = line.strip().partition(" ")
        if command == "save":
            torch.save([x.float().cpu() for x in once()], path)
            answer = {}
        else:
            start = time.perf_counter()
            once()
            answer = {"seconds": time.perf_counter() - start}
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM") - empty
        print(json.dumps({**answer, "peak": peak}), flush=True)


# In the parent.


class Worker:
    """The process of a candidate."""

    def __init__(self, candidate: Candidate, args: argparse.Namespace, memory: bool = False) -> None:
        options = ["--height", args.height, "--width", args.width, "--threads", args.threads, "--device", args.device]
        command = [sys.executable, __file__, "--worker", json.dumps(asdict(candidate)), *map(str, options)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
        if memory:
            command.append("--memory")
            environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
        self.candidate = candidate
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in close()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            stderr=self.errors,
        )
        answer = self._answer()
        self.parameters, self.chosen = answer["parameters"], answer["chosen"]

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        status = self.process.wait()
        self.errors.seek(0)
        raise RuntimeError(f"{self.candidate}: the process ended with status {status}\n{self.errors.read()[-2000:]}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Largest difference, relative to the largest value of each output."""
    pairs = zip(ours, theirs, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs)


def measure(candidates: Sequence[Candidate], args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Time candidates alternately, then measure the memory of each alone. Ratios refer to the first one."""
    workers = [Worker(candidate, args) for candidate in candidates]
    outputs = []
    for i, worker in enumerate(workers):
        worker.ask(f"save {folder / f'{i}.pt'}")
        outputs.append(torch.load(folder / f"{i}.pt"))
    times: list[list[float]] = [[] for _ in workers]
    for _ in range(args.rounds):
        for found, worker in zip(times, workers, strict=True):
            found.append(worker.ask("run")["seconds"])
    for worker in workers:
        worker.close()
    # After the timing: under the allocator of this part, PyTorch is slow, and "auto" would keep what it chose there.
    memory = []
    for candidate in candidates:
        worker = Worker(candidate, args, memory=True)
        worker.ask("run")
        memory.append(worker.ask("run")["peak"])
        worker.close()
    rows = []
    for worker, found, peak, output in zip(workers, times, memory, outputs, strict=True):
        same = len(output) == len(outputs[0]) and all(a.shape == b.shape for a, b in zip(output, outputs[0]))
        weights = worker.candidate.weights
        rows.append(
            {
                # The path of the weights is a temporary folder.
                **{k: v for k, v in asdict(worker.candidate).items() if k != "weights"},
                "parameters": worker.parameters,
                **({"chosen": worker.chosen.splitlines()} if worker.chosen else {}),
                "seconds": statistics.median(found),
                "iqr": statistics.quantiles(found, n=4)[2] - statistics.quantiles(found, n=4)[0],
                "speed": ratio(times[0], found),
                "peak": peak,
                "memory": peak / memory[0],
                "difference": difference(output, outputs[0]) if same and weights else None,
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]], against: str) -> None:
    table = [
        (
            f"{row['program']} {row['head']}",
            row["backbone"],
            row["mode"],
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['seconds']:.3f} ± {row['iqr'] / 2:.3f}",
            f"{row['speed']:.2f}",
            f"{row['peak'] / 2**20:.0f}",
            f"{row['memory']:.2f}",
            "–" if row["difference"] is None else f"{row['difference']:.1e}",
        )
        for row in rows
    ]
    headers = [
        "model",
        "backbone",
        "mode",
        "M param.",
        "s/frame",
        f"speed ({against}=1)",
        "peak MiB",
        "memory",
        "diff.",
    ]
    print(tabulate(table, headers, disable_numparse=True), flush=True)
    print()


def goal(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best of our modes of equal output against Hugging Face eager, and ours in the fastest runtimes."""
    prepared = next((r for r in rows if r["program"] == "the_mask" and r["mode"] == "auto"), None)
    if prepared is not None:
        equal = (prepared["difference"] or 0) <= PREPARED_TOLERANCE
        print(
            f"goal ({GOAL_PREPARED:g} x Hugging Face's speed, prepared): speed {prepared['speed']:.3g}, "
            f"difference {prepared['difference']:.2g}, met {equal and prepared['speed'] >= GOAL_PREPARED}"
        )
    own = [r for r in rows if r["program"] == "the_mask" and r["mode"] != "auto"]
    ours = [r for r in own if (r["difference"] or 0) <= TOLERANCE]
    best = max(ours, key=lambda row: row["speed"], default=None)
    if best is None:
        return {"backbone": rows[0]["backbone"], "met": False, "reason": "no mode has equal output"}
    met = best["speed"] >= GOAL_SPEED and best["memory"] <= GOAL_MEMORY
    return {**{k: best[k] for k in ("backbone", "mode", "speed", "memory", "difference")}, "met": met}


def peers(backbone: str, modes: Sequence[str], args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Ours and Hugging Face's Mask2Former with the same weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        huggingface_model(backbone).save_pretrained(folder)
        base = Candidate("huggingface", backbone, "mask2former", "eager", name)
        others = [base] if args.quick else [replace(base, mode=mode) for mode in modes if mode != "auto"]
        ours = [replace(base, program="the_mask", mode=mode) for mode in modes]
        rows = measure([base, *(c for c in others if c != base), *ours], args, folder)
    return rows, goal(rows)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the goal only: R50 and Swin-T against Hugging Face")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager", "channels_last"])
    parser.add_argument("--backbones", nargs="+", choices=tuple(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--rounds", type=int, default=7, help="frames per candidate (default: 7)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=853)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "models.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: quartiles need at least 2")
    if args.worker:
        serve(Candidate(**json.loads(args.worker)), args)
        return 0
    arguments = {name: str(value) for name, value in vars(args).items() if name != "output"}
    result: dict[str, Any] = {"machine": machine(), "arguments": arguments, "rows": []}
    goals = []
    for backbone in (name for name in PEERED if name in args.backbones):
        rows, reached = peers(backbone, args.modes, args)
        show(rows, "Hugging Face")
        goals.append(reached)
        result["rows"] += rows
    if not args.quick:
        base = Candidate("torchvision", "r50", "deeplabv3", "eager")
        # One backbone at a time, because all its candidates are in memory together.
        for backbone in args.backbones:
            ours = [Candidate("the_mask", backbone, head, mode) for head in HEADS for mode in args.modes]
            with tempfile.TemporaryDirectory() as name:
                rows = measure([base, *ours], args, Path(name))
            show(rows, "DeepLabV3")
            result["rows"] += rows
    for reached in goals:
        found = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in reached.items())
        print(f"goal ({GOAL_SPEED:g} x Hugging Face's speed, {GOAL_MEMORY:g} x its memory): {found}")
    result["goals"] = goals
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
