"""Time the criterion: matching and losses, one and two rounds, compared with the plain formulation.

Prints medians with the interquartile range and writes JSON. Two parts:

- ``criterion``: random mask-like outputs, forward (matching separately) and backward, alternating one and two rounds;
- ``plain``: the same matching costs by the plain formulation (``grid_sample`` of all queries, four pairwise sums per
  prediction set, a copy to the host each), and the largest difference of the costs.

    python benchmarks/bench_criterion.py --threads 1 2

Its share of a training step: ``bench_the_mask.py``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import quartiles, synchronise
from torch import Tensor

import the_mask
from the_mask.config.keys.mask_former import HierarchyOptions, LossOptions
from the_mask.data.clips import Clip
from the_mask.modeling.mask import losses
from the_mask.modeling.mask import points as sampling
from the_mask.modeling.mask.criterion import MaskCriterion
from the_mask.modeling.mask.matching import assign
from the_mask.modeling.mask.targets import ClipTargets, build_targets

Times = dict[str, list[float]]
Clock = Callable[[], float]


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


def random_clips(args: argparse.Namespace) -> list[Clip]:
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
        clips.append(Clip(frames, labels, seed=b, dataset="random", video_id=str(b)))
    return clips


def time_matching(
    criterion: MaskCriterion, sink: list[float], device: torch.device, clock: Clock
) -> Callable[[], None]:
    """Make the criterion append the seconds of its matching to ``sink``; returns a function that undoes it."""
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
    """Times of the criterion alone, alternating one and two rounds, so that both see the same machine load."""
    outputs, clips = random_outputs(args, device), random_clips(args)
    times: dict[int, Times] = {1: defaultdict(list), 2: defaultdict(list)}
    for repeat in range(args.repeats + 1):
        for rounds, found in times.items():
            options, hierarchy = LossOptions(train_num_points=args.points), HierarchyOptions(rounds=rounds)
            criterion = MaskCriterion(num_classes=args.classes, options=options, hierarchy=hierarchy).to(device)
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
    """Matching as usually implemented, with the same points and costs as in the criterion, and the assignment."""
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
    """Times of plain matching, and the largest difference of its costs from the criterion's."""
    outputs, clips = random_outputs(args, device), random_clips(args)
    targets = build_targets(clips, 255, args.classes, tuple(args.size), device)
    times, costs = [], []
    for _ in range(max(args.repeats // 2, 1)):
        start = clock()
        costs = plain_costs(outputs, targets, args)
        synchronise(device)
        times.append(clock() - start)
    from the_mask.modeling.mask import criterion as module

    found: list[Tensor] = []
    original = module.match_all
    module.match_all = lambda given, *rest: found.extend(given) or original(given, *rest)  # type: ignore[func-returns-value]
    try:
        criterion = MaskCriterion(num_classes=args.classes, options=LossOptions(train_num_points=args.points)).to(
            device
        )
        criterion(outputs, targets, list(range(args.clips)))
    finally:
        module.match_all = original
    difference = max(float((a - b).abs().max()) for a, b in zip(found, costs, strict=True))
    return {"matching": quartiles(times), "largest_cost_difference": difference}


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
        report[f"threads_{threads}"] = part
        for name, result in part.items():
            show(f"{name}, {threads} thread(s), {args.size[0]}x{args.size[1]}, T={args.frames}", result)
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1))
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
