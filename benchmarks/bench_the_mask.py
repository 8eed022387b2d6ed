"""Time the whole of THE-Mask: training step by parts, evaluation, streaming, peak memory, and a peer's training step.

    python benchmarks/bench_the_mask.py                      # everything, about 10 minutes on two cores
    python benchmarks/bench_the_mask.py --parts step stream

Parts, each with medians and the interquartile range of alternating runs:

- ``step``: a training step of a one-frame model split into forward, matching, losses, backward and optimiser, with one
  and with two rounds of matching;
- ``peer``: the same step of Hugging Face's Mask2Former (same backbone, image, classes, queries and points);
- ``evaluate``: ``predict`` of a one-frame model, frames per second;
- ``stream``: one step of a temporal model's stream with windows of 1, 2 and 4 frames;
- ``memory``: growth of a fresh process over a training step (480x480) and over a prediction (480x853), 124 classes.

Weights are random: they do not matter for time.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_criterion import Clock, Times, random_clips, show, time_matching
from bench_models import BACKBONES, PEERED
from common import machine, peak_memory, write_json
from timing import quartiles, race, synchronise
from torch import nn

from the_mask.config import load_config
from the_mask.config.keys.mask_former import HierarchyOptions
from the_mask.data.clips import Clip
from the_mask.engine.memory import keep_freed_memory
from the_mask.engine.optimizer import build_optimizer
from the_mask.modeling import MaskClassifier
from the_mask.modeling.mask.targets import build_targets
from the_mask.modeling.stream import Ring

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "vspw"
ONE_FRAME, TEMPORAL = CONFIGS / "the_mask_r50_1f.yaml", CONFIGS / "the_mask_r50_video.yaml"
PARTS = ("step", "evaluate", "stream", "memory")
WINDOWS = (1, 2, 4)


def build(config: Path, classes: int, *overrides: Any) -> MaskClassifier:
    """The model of a config with random weights."""
    torch.manual_seed(0)
    keys = ["MODEL.WEIGHTS", "", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", classes, *overrides]
    return MaskClassifier(load_config(config, [str(key) for key in keys]))


def clips_of(size: tuple[int, int], frames: int = 1) -> list[Clip]:
    """One clip of random pixels and blocky labels of 8 classes."""
    return random_clips(argparse.Namespace(clips=1, frames=frames, size=size, targets=8))


def update(model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Clip gradients and step, as the trainer does."""
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimiser.step()


def one_step(
    model: MaskClassifier, optimiser: torch.optim.Optimizer, clips: list[Clip], repeat: int, clock: Clock
) -> dict[str, float]:
    """Seconds of the parts of one training step."""
    device = model.device
    matching: list[float] = []
    undo = time_matching(model.criterion, matching, device, clock)
    times = [clock()]

    def lap() -> None:
        synchronise(device)
        times.append(clock())

    images, frames = model.stack(clips)
    outputs = model.sem_seg_head(model.backbone(images), frames, aux=True)
    lap()
    targets = build_targets(clips, 255, model.num_classes, (images.shape[-2], images.shape[-1]), device)
    losses = model.criterion(outputs, targets, [repeat] * len(clips), repeat)
    total = torch.stack(list(losses.values())).sum()
    lap()
    optimiser.zero_grad(set_to_none=True)
    total.backward()
    lap()
    update(model, optimiser)
    lap()
    undo()
    forward, criterion, backward, finish = (b - a for a, b in itertools.pairwise(times))
    return {
        "forward": forward,
        "matching": matching[0],
        "losses": criterion - matching[0],
        "backward": backward,
        "optimiser": finish,
        "step": times[-1] - times[0],
    }


def bench_step(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Training steps with one and two rounds and the peer's, in turn."""
    # R50 as the config has it.
    model = build(ONE_FRAME, args.classes, *([] if args.backbone == "r50" else BACKBONES[args.backbone])).train()
    optimiser = build_optimizer(load_config(ONE_FRAME), model)
    clips = clips_of(args.size)
    peer = hugging_face_step(args, clips) if args.peer else None
    times: dict[int, Times] = {1: defaultdict(list), 2: defaultdict(list)}
    peer_times: list[float] = []
    for repeat in range(args.repeats + 1):
        for rounds, found in times.items():
            model.criterion.hierarchy = HierarchyOptions(rounds=rounds)
            for name, seconds in one_step(model, optimiser, clips, repeat, clock).items():
                if repeat:  # the first is warm-up
                    found[name].append(seconds)
        if peer is not None:
            start = clock()
            peer()
            if repeat:
                peer_times.append(clock() - start)
    result: dict[str, Any] = {f"rounds_{r}": {k: quartiles(v) for k, v in found.items()} for r, found in times.items()}
    for row in result.values():
        step = row["step"]["median_ms"]
        row["matching_share"] = row["matching"]["median_ms"] / step
        row["criterion_share"] = (row["matching"]["median_ms"] + row["losses"]["median_ms"]) / step
    result["two_rounds_over_one"] = median_ratio(times[2]["step"], times[1]["step"])
    if peer is not None:
        result["hugging_face_step"] = quartiles(peer_times)
        result["hugging_face_over_ours"] = median_ratio(peer_times, times[1]["step"])
    return result


def median_ratio(above: list[float], below: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def hugging_face_step(args: argparse.Namespace, clips: list[Clip]) -> Callable[[], None]:
    """A training step of transformers' Mask2Former on the same image, its deformable attention as it comes."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig, SwinConfig

    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    kind: Any = SwinConfig if args.backbone == "swin_t" else ResNetConfig
    config = Mask2FormerConfig(backbone_config=kind(out_features=stages))
    config.num_labels = args.classes
    model = Mask2FormerForUniversalSegmentation(config).to(args.device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    frame, labels = clips[0].frames[0], clips[0].labels[0]
    # Ours pads to a multiple of 32; the peer gets the same padding, so that both see the same pixels.
    height, width = (-(-side // 32) * 32 for side in frame.shape[-2:])
    pixels = torch.zeros(1, 3, height, width)
    pixels[0, :, : frame.shape[-2], : frame.shape[-1]] = (frame.float() - 120) / 58
    present = [int(k) for k in labels.unique() if k < args.classes]
    masks = torch.zeros(len(present), height, width)
    for row, k in enumerate(present):
        masks[row, : labels.shape[0], : labels.shape[1]] = labels == k
    classes = torch.tensor(present, device=args.device)
    pixels, masks = pixels.to(args.device), masks.to(args.device)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        model(pixel_values=pixels, mask_labels=[masks], class_labels=[classes]).loss.backward()
        update(model, optimiser)
        synchronise(torch.device(args.device))

    return step


def bench_evaluate(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Prediction of single frames at 480x853, label maps included."""
    model = build(ONE_FRAME, 124).eval()
    clips = clips_of((480, 853))
    times = race({"predict": lambda: model.predict(clips)}, args.repeats, model.device)["predict"]
    return {"predict": quartiles(times), "frames_per_second": 1 / statistics.median(times)}


def bench_stream(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Steps of a temporal model's streams with full memories, alternating the windows."""
    model = build(TEMPORAL, 124).eval()
    frame = clips_of((480, 853))[0].frames[0]
    states: dict[int, Any] = {}
    times: dict[int, list[float]] = {window: [] for window in WINDOWS}
    for window in WINDOWS:
        model.ring = Ring(window)
        states[window] = model.init_state()
        for _ in range(window):
            _, states[window] = model.step(frame, states[window])
    for _ in range(args.repeats):
        for window, found in times.items():
            model.ring = Ring(window)
            start = clock()
            _, states[window] = model.step(frame, states[window])
            synchronise(model.device)
            found.append(clock() - start)
    result: dict[str, Any] = {f"window_{window}": quartiles(found) for window, found in times.items()}
    for window in WINDOWS[1:]:
        result[f"window_{window}_over_1"] = median_ratio(times[window], times[1])
    return result


def measure_memory(args: argparse.Namespace) -> int:
    """Memory growth of this process, in bytes, during the work of ``args.measure``; run in a separate process."""
    config = TEMPORAL if args.measure.startswith("temporal") else ONE_FRAME
    training = args.measure.endswith("training")
    frames = len(load_config(config).INPUT.CLIP.DILATIONS) + 1 if config is TEMPORAL else 1
    model = build(config, 124).train(training)
    clips = clips_of((480, 480) if training else (480, 853), frames)
    if not training:
        return peak_memory(lambda: model.predict(clips))

    def step() -> None:
        torch.stack(list(model(clips).values())).sum().backward()

    return peak_memory(step)


def bench_memory(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Peak growth in MB, each in a fresh process."""
    result = {}
    for name in ("one-frame training", "temporal training", "one-frame inference", "temporal inference"):
        command = [sys.executable, __file__, "--measure", name, "--threads", str(torch.get_num_threads())]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        result[f"{name} MB"] = int(done.stdout.split()[-1]) / 1e6
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", type=int, nargs=2, default=[240, 427], metavar=("H", "W"), help="of the step's image")
    parser.add_argument("--classes", type=int, default=8, help="of the step's model")
    parser.add_argument("--backbone", choices=PEERED, default="r50", help="of the step's model")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave Hugging Face's step out")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time of all threads")
    parser.add_argument("--output", default="the_mask_cpu", help="name of the JSON file, without its ending")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the trainer does; it serves the peer too
    if args.measure:
        print(measure_memory(args))
        return
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    report: dict[str, Any] = {"machine": machine(), "arguments": vars(args)}
    benches = {"step": bench_step, "evaluate": bench_evaluate, "stream": bench_stream, "memory": bench_memory}
    for part in args.parts:
        report[part] = benches[part](args, clock)
        show(part, report[part])
        path = write_json(args.output, report)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
