"""Time the criterion: matching and losses, one and two rounds, alone and as a share of a training step.

Prints medians with the interquartile range and writes JSON. Three parts:

- ``criterion``: random mask-like outputs, forward (matching apart) and backward, with one and two rounds in turn;
- ``plain``: the same matching costs by the plain formulation (``grid_sample`` of all queries, four pairwise sums per
  prediction set, a copy to the host each), and the largest difference of the costs;
- ``step``: a training step of a config's model on one random clip, and the criterion's share of it.

    python benchmarks/bench_criterion.py --threads 1 2
    python benchmarks/bench_criterion.py --config-file configs/vspw/mask2former_r50.yaml --size 240 427
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import the_mask
from the_mask.config import load_config
from the_mask.modeling import losses
from the_mask.modeling import points as sampling
from the_mask.modeling.criterion import MaskCriterion
from the_mask.modeling.matching import assign
from the_mask.modeling.targets import ClipTargets, build_targets

Times = dict[str, list[float]]
Clock = Callable[[], float]


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and interquartile range, milliseconds."""
    ordered = sorted(values)
    if len(ordered) < 4:
        return {"median_ms": 1e3 * statistics.median(ordered), "iqr_ms": 1e3 * (ordered[-1] - ordered[0])}
    q1, q2, q3 = statistics.quantiles(ordered, n=4)
    return {"median_ms": 1e3 * q2, "iqr_ms": 1e3 * (q3 - q1)}


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock read afterwards means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_outputs(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Outputs of all prediction sets: masks are smooth like a network's, of stride 4."""
    generator = torch.Generator().manual_seed(0)
    height, width = (-(-side // 4) for side in args.size)
    branches = []
    for frame in (False, True) if args.frame_branch else (False,):
        sets: list[dict[str, Any]] = []
        for _ in range(args.sets):
            coarse = torch.randn(args.clips * args.queries * args.frames, 1, 8, 12, generator=generator) * 6
            masks = F.interpolate(coarse, size=(height, width), mode="bilinear")
            shape = (args.clips, args.frames, args.queries) if frame else (args.clips, args.queries)
            logits = torch.randn(*shape, args.classes + 1, generator=generator)
            sets.append(
                {
                    "pred_logits": logits.to(device).requires_grad_(),
                    "pred_masks": masks.view(args.clips, args.queries, args.frames, height, width)
                    .to(device)
                    .requires_grad_(),
                }
            )
        branches.append({**sets[-1], "aux_outputs": sets[:-1]})
    outputs = branches[0]
    if args.frame_branch:
        outputs["frame"] = branches[1]
    return outputs


def random_clips(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Clips of blocky label maps with ``--targets`` classes and a little void."""
    generator = torch.Generator().manual_seed(1)
    clips = []
    for b in range(args.clips):
        labels = []
        for _ in range(args.frames):
            coarse = torch.randint(args.targets, (1, 1, 6, 10), generator=generator)
            coarse[0, 0, 0, : args.targets] = torch.arange(args.targets)[:10]
            label = F.interpolate(coarse.float(), size=tuple(args.size), mode="nearest")[0, 0].long()
            label[-8:] = 255
            labels.append(label)
        frames = [torch.randint(256, (3, *args.size), generator=generator, dtype=torch.uint8) for _ in labels]
        clips.append({"labels": labels, "frames": frames, "seed": b, "dataset": "random", "video_id": str(b)})
    return clips


def time_matching(
    criterion: MaskCriterion, sink: list[float], device: torch.device, clock: Clock
) -> Callable[[], None]:
    """Make the criterion write the seconds of its matching to ``sink``; returns what undoes it."""
    original = criterion._match

    def timed(*args: Any) -> Any:
        synchronise(device)
        start = clock()
        result = original(*args)
        synchronise(device)
        sink.append(clock() - start)
        return result

    vars(criterion)["_match"] = timed
    return lambda: vars(criterion).pop("_match") and None


def leaves(outputs: dict[str, Any]) -> list[Tensor]:
    """All tensors of all prediction sets."""
    found: list[Tensor] = []
    for branch in [outputs, *([outputs["frame"]] if "frame" in outputs else [])]:
        for one in [*branch["aux_outputs"], branch]:
            found += [one["pred_logits"], one["pred_masks"]]
    return found


def bench_criterion(args: argparse.Namespace, device: torch.device, clock: Clock) -> dict[str, Any]:
    """Times of the criterion alone, one and two rounds in turn so that both see the same machine."""
    outputs, clips = random_outputs(args, device), random_clips(args)
    times: dict[int, Times] = {1: defaultdict(list), 2: defaultdict(list)}
    for repeat in range(args.repeats + 1):
        for rounds, found in times.items():
            criterion = MaskCriterion(num_classes=args.classes, rounds=rounds, num_points=args.points).to(device)
            matching: list[float] = []
            time_matching(criterion, matching, device, clock)
            start = clock()
            targets = build_targets(clips, 255, args.classes, tuple(args.size), device)
            built = clock()
            total = sum(criterion(outputs, targets, [repeat] * args.clips).values())
            synchronise(device)
            forward = clock()
            torch.autograd.grad(total, leaves(outputs))
            synchronise(device)
            backward = clock()
            if repeat:  # the first is warm-up
                found["targets"].append(built - start)
                found["matching"].append(matching[0])
                found["losses"].append(forward - built - matching[0])
                found["backward"].append(backward - forward)
                found["all"].append(backward - start)
    return {f"rounds_{r}": {k: quartiles(v) for k, v in found.items()} for r, found in times.items()}


@torch.no_grad()
def plain_costs(outputs: dict[str, Any], targets: Sequence[ClipTargets], args: argparse.Namespace) -> list[Tensor]:
    """Matching as it is usually written; the same points and costs as the criterion's, and the assignment."""
    mask_branch = outputs.get("frame", outputs)
    class_sets = [*outputs["aux_outputs"], outputs]
    mask_sets = [*mask_branch["aux_outputs"], mask_branch]
    device, costs = outputs["pred_logits"].device, []
    for b, target in enumerate(targets):
        generator = sampling.point_generator(b, 0, device)
        draws = torch.rand(len(class_sets), args.points, 2, generator=generator, device=device)
        truth = torch.cat([target.masks(), ~target.valid()[None]]).float()
        for s, points in enumerate(draws):
            x = sampling.point_sample(mask_sets[s]["pred_masks"][b].transpose(0, 1), points.expand(args.frames, -1, -1))
            x = x.transpose(0, 1).flatten(1)
            t = sampling.point_sample(truth[:-1].transpose(0, 1), points.expand(args.frames, -1, -1))
            t = t.transpose(0, 1).flatten(1)
            ignored = sampling.point_sample(
                truth[-1:].transpose(0, 1), points.expand(args.frames, -1, -1), "border"
            ).flatten()
            v = 1 - ignored
            positive, negative = F.softplus(-x), F.softplus(x)
            bce = (positive @ t.t() + negative @ (v - t).t()) / v.sum()
            p = x.sigmoid()
            dice = 1 - (2 * p @ t.t() + 1) / ((p * v).sum(1)[:, None] + t.sum(1)[None] + 1)
            labels = target.labels.to(device)
            cost = 2 * losses.class_cost(class_sets[s]["pred_logits"][b], labels) + 5 * bce + 5 * dice
            assign(cost, 1)
            costs.append((b, s, cost))
    return [cost for _, _, cost in sorted(costs, key=lambda c: (c[1], c[0]))]


def bench_plain(args: argparse.Namespace, device: torch.device, clock: Clock) -> dict[str, Any]:
    """Times of plain matching, and how far its costs are from the criterion's."""
    outputs, clips = random_outputs(args, device), random_clips(args)
    targets = build_targets(clips, 255, args.classes, tuple(args.size), device)
    times, costs = [], []
    for _ in range(max(args.repeats // 2, 1)):
        start = clock()
        costs = plain_costs(outputs, targets, args)
        synchronise(device)
        times.append(clock() - start)
    from the_mask.modeling import criterion as module

    found: list[Tensor] = []
    original = module.match_all
    module.match_all = lambda given, *rest: found.extend(given) or original(given, *rest)  # type: ignore[func-returns-value]
    try:
        criterion = MaskCriterion(num_classes=args.classes, num_points=args.points).to(device)
        criterion(outputs, targets, list(range(args.clips)))
    finally:
        module.match_all = original
    difference = max(float((a - b).abs().max()) for a, b in zip(found, costs, strict=True))
    return {"matching": quartiles(times), "largest_cost_difference": difference}


def bench_step(args: argparse.Namespace, device: torch.device, clock: Clock) -> dict[str, Any]:
    """Training steps of a config's model on random clips, one and two rounds in turn."""
    from the_mask.modeling import MaskClassifier

    # The weights do not matter for time.
    overrides = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", device.type, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(args.classes)]
    model = MaskClassifier(load_config(args.config_file, overrides)).to(device)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    clips = random_clips(args)
    times: dict[int, Times] = {1: defaultdict(list), 2: defaultdict(list)}
    for repeat in range(args.repeats + 1):
        for rounds, found in times.items():
            model.criterion.rounds = rounds
            matching: list[float] = []
            undo = time_matching(model.criterion, matching, device, clock)
            start = clock()
            images, frames = model.stack(clips)
            outputs = model.sem_seg_head(model.backbone(images), frames, aux=True)
            synchronise(device)
            predicted = clock()
            targets = build_targets(clips, 255, args.classes, (images.shape[-2], images.shape[-1]), device)
            total = sum(model.criterion(outputs, targets, [repeat] * args.clips).values())
            synchronise(device)
            forward = clock()
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            synchronise(device)
            backward = clock()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimiser.step()
            synchronise(device)
            end = clock()
            undo()
            if repeat:
                found["forward"].append(predicted - start)
                found["matching"].append(matching[0])
                found["losses"].append(forward - predicted - matching[0])
                found["backward"].append(backward - forward)
                found["optimiser"].append(end - backward)
                found["step"].append(end - start)
    result: dict[str, Any] = {f"rounds_{r}": {k: quartiles(v) for k, v in found.items()} for r, found in times.items()}
    for rounds in times:
        row = result[f"rounds_{rounds}"]
        step = row["step"]["median_ms"]
        row["matching_share"] = row["matching"]["median_ms"] / step
        row["criterion_share"] = (row["matching"]["median_ms"] + row["losses"]["median_ms"]) / step
    pairs = zip(times[1]["step"], times[2]["step"], strict=True)
    result["two_rounds_over_one"] = statistics.median(b / a for a, b in pairs)
    return result


def show(title: str, result: dict[str, Any]) -> None:
    """Print one part as a table."""
    print(f"\n{title}")
    for name, row in result.items():
        if not isinstance(row, dict):
            print(f"  {name:28s} {row:.3g}")
        elif "median_ms" in row:
            print(f"  {name:28s} {row['median_ms']:9.1f} ms  (IQR {row['iqr_ms']:.1f})")
        else:
            show(f"  {name}", row)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=[240, 427], metavar=("H", "W"))
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--frame-branch", action="store_true", help="as the temporal decoder has")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--classes", type=int, default=124)
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--points", type=int, default=12544)
    parser.add_argument("--sets", type=int, default=10, help="prediction sets")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time of all threads, for a machine that others use too",
    )
    parser.add_argument("--config-file", default="", help="also time training steps of this config's model")
    parser.add_argument("--output", default="output/bench_criterion.json")
    args = parser.parse_args()

    device = torch.device(args.device)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    report: dict[str, Any] = {
        "machine": {"platform": platform.platform(), "processor": platform.processor(), "device": str(device)},
        "versions": {"the_mask": the_mask.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "dtype": "float32",
        "shapes": {k: v for k, v in vars(args).items() if k not in ("output", "threads", "device")},
    }
    for threads in args.threads if device.type == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        part: dict[str, Any] = {
            "criterion": bench_criterion(args, device, clock),
            "plain": bench_plain(args, device, clock),
        }
        if args.config_file:
            part["step"] = bench_step(args, device, clock)
        report[f"threads_{threads}"] = part
        for name, result in part.items():
            show(f"{name}, {threads} thread(s), {args.size[0]}x{args.size[1]}, T={args.frames}", result)
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1))
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
