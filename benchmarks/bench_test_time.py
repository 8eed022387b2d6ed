"""Gain and cost of each test-time method: one table for a data set, with figures and seconds per frame.

benchmarks/bench_test_time.py --config-file A.yaml --weights a.pth --member-config B.yaml --member-weights b.pth \
    --earlier-weights a_earlier.pth --dataset camvid_val --fit-dataset camvid_train --rows single flip scales

Seconds per frame are processor time of the whole evaluation (reading, model, merging, metrics) on one thread, which is
hardly affected by other jobs. Rows are added to the JSON file one by one; existing rows are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, machine

import the_mask.modeling  # noqa: F401  fills the registries
from the_mask.config import load_config
from the_mask.data import get_class_names, get_records, read_image
from the_mask.engine import RunOptions
from the_mask.engine.predict import run_calibration
from the_mask.evaluation import confusion_matrix, evaluate_dataset, iou_from_confusion
from the_mask.evaluation.loop import stream_videos
from the_mask.inference import MultiView, normalize_scores
from the_mask.inference.compose import build_score_stream
from the_mask.weights import trained
from the_mask.weights.averaging import average_checkpoints

FIGURES = ("mIoU", "BIoU", "pACC", "VC8", "VC16")
Overrides = list[Any]


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(args.json.read_text()) if args.json.is_file() else {"machine": machine(), "rows": {}}
    rows = row_table(args)
    for name in rows if args.rows is None else args.rows:
        if name not in rows:
            raise SystemExit(f"unknown row {name!r}; known are {', '.join(rows)}")
        if name in content["rows"]:
            continue
        content["rows"][name] = measure(args, rows[name](content))
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    if args.double_softmax:
        content["double softmax"] = double_softmax(args)
        args.json.write_text(json.dumps(content, indent=1) + "\n")
        print(json.dumps(content["double softmax"], indent=1))
    if args.overhead:
        content["overhead"] = overhead(args)
        args.json.write_text(json.dumps(content, indent=1) + "\n")
        print(content["overhead"])
    print(table(content["rows"]))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--weights", required=True, type=Path)
    parser.add_argument("--member-config", help="second model of the ensembles")
    parser.add_argument("--member-weights", type=Path)
    parser.add_argument("--earlier-weights", type=Path, help="another checkpoint of the first model, to average with")
    parser.add_argument("--refiner-weights", default="", help="trained CascadePSP (tools/train_refiner.py)")
    parser.add_argument("--refiner", nargs="*", default=[], metavar="KEY VALUE", help="its MODEL.REFINER keys")
    parser.add_argument("--dataset", default="camvid_val")
    parser.add_argument("--fit-dataset", default="camvid_train", help="where temperatures are fitted")
    parser.add_argument("--fit-videos", type=int, default=0, metavar="N", help="first N videos of it; 0: all")
    parser.add_argument("--scales", nargs="+", type=float, default=[0.75, 1.0, 1.25, 1.5, 1.75])
    parser.add_argument("--rows", nargs="*", help="names of rows; default: all")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY VALUE", help="overrides for all rows")
    parser.add_argument(
        "--double-softmax", action="store_true", help="also a sum in which one member has a second softmax"
    )
    parser.add_argument("--overhead", action="store_true", help="also the cost of views without their forward passes")
    parser.add_argument("--json", type=Path, default=RESULTS / "test_time.json")
    return parser


def row_table(args: argparse.Namespace) -> dict[str, Callable[[dict[str, Any]], Overrides]]:
    """Overrides of every row; a function, because some need what an earlier row has found."""
    least = load_config(args.config_file).INPUT.TEST.SHORT_EDGE
    ensemble = ["TEST.ENSEMBLE.CONFIGS", [args.member_config], "TEST.ENSEMBLE.CHECKPOINTS", [str(args.member_weights)]]
    views = ["TEST.VIEWS.SCALES", args.scales, "TEST.VIEWS.FLIP", True]
    small = ["TEST.VIEWS.SCALES", [0.5, 0.75, 1.0], "TEST.VIEWS.FLIP", True, "TEST.VIEWS.MIN_SHORT_EDGE", least]

    def plain(*overrides: Any) -> Callable[[dict[str, Any]], Overrides]:
        return lambda content: list(overrides)

    def averaged(content: dict[str, Any]) -> Overrides:
        path = args.json.with_suffix(".averaged.pth")
        average_checkpoints([args.earlier_weights, args.weights], path)
        return ["MODEL.WEIGHTS", str(path)]

    def temperature(content: dict[str, Any]) -> Overrides:
        found = [
            run_calibration(
                RunOptions(config, ["MODEL.WEIGHTS", str(weights), *args.set]), args.fit_dataset, 200, args.fit_videos
            )
            for config, weights in ((args.config_file, args.weights), (args.member_config, args.member_weights))
        ]
        content["temperatures"] = [vars(calibration) for calibration in found]
        values = [calibration.temperature for calibration in found]
        return [*ensemble, "TEST.ENSEMBLE.NORMALIZE", "temperature", "TEST.ENSEMBLE.TEMPERATURES", values]

    def earlier(content: dict[str, Any]) -> Overrides:
        return ["MODEL.WEIGHTS", str(args.earlier_weights)]

    rows = {
        "single": plain(),
        "earlier checkpoint": earlier,
        "averaged weights": averaged,
        "flip": plain("TEST.VIEWS.FLIP", True),
        "scales + flip": plain(*views),
        "scales + flip, geometric": plain(*views, "TEST.VIEWS.NORMALIZE", "sum-to-one", "TEST.VIEWS.MEAN", "geometric"),
        "scales + flip, mmseg (second softmax)": plain(*views, "TEST.VIEWS.PARITY", "mmseg"),
        "small scales + flip": plain(*small[:4]),
        "small scales + flip, mmseg (clamped)": plain(*small, "TEST.VIEWS.PARITY", "mmseg"),
        "windows": plain("TEST.WINDOW.SIZE", [160, 224]),
    }
    for soft in (False, True):
        voting = ["TEST.VOTING.MASKS", "superpixels", "TEST.VOTING.SOFT", soft]
        rows[f"superpixel voting{', soft' if soft else ''}"] = plain(*voting)
    rows["superpixel voting, majority 0.75"] = plain(
        "TEST.VOTING.MASKS", "superpixels", "TEST.VOTING.MIN_MAJORITY", 0.75
    )
    if args.refiner_weights:
        network = ["TEST.REFINER.WEIGHTS", args.refiner_weights, "TEST.REFINER.LEAST_AREA", 256, *args.refiner]
        rows["CascadePSP, uncertain components"] = plain(*network)
        rows["CascadePSP, all components"] = plain(*network, "TEST.REFINER.MIN_UNCERTAIN", 0.0)
    if args.member_config:
        rows["member alone"] = plain(*ensemble, "TEST.ENSEMBLE.WITHOUT_SELF", True)
        for mode in ("none", "sum-to-one", "softmax"):
            rows[f"ensemble, {mode}"] = plain(*ensemble, "TEST.ENSEMBLE.NORMALIZE", mode)
        rows["ensemble, sum-to-one, geometric"] = plain(*ensemble, "TEST.ENSEMBLE.MEAN", "geometric")
        rows["ensemble, temperature"] = temperature
    return rows


def overhead(args: argparse.Namespace, rounds: int = 2) -> dict[str, float]:
    """Processor seconds of six scales x flip on one frame, against the sum of the model's twelve forward passes."""
    cfg = load_config(args.config_file, ["MODEL.WEIGHTS", str(args.weights), *args.set])
    model = trained(cfg, datasets=[args.dataset])
    cfg.TEST.VIEWS.SCALES, cfg.TEST.VIEWS.FLIP = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75], True
    stream = MultiView.from_config(cfg, model, "scores")
    image = read_image(get_records(args.dataset)[0]["frames"][0]["file_name"])
    spent = {"whole": 0.0, "forwards": 0.0}
    real = stream.model.step

    def timed(pixels: torch.Tensor, state: Any, hints: Any) -> Any:
        start = time.process_time()
        result = real(pixels, state, hints)
        spent["forwards"] += time.process_time() - start
        return result

    stream.model.step = timed
    with torch.no_grad():
        stream.step(image, stream.init_state())
        spent.update(whole=0.0, forwards=0.0)
        for _ in range(rounds):
            start = time.process_time()
            stream.step(image, stream.init_state())
            spent["whole"] += time.process_time() - start
    return {name: seconds / rounds for name, seconds in spent.items()} | {"ratio": spent["whole"] / spent["forwards"]}


def double_softmax(args: argparse.Namespace, every: int = 10) -> dict[str, Any]:
    """Effect of a second softmax on one member's scores in a sum of two members, on every tenth frame.

    Returns:
        mIoU (percent) of each member and of the sums, ``A`` and ``B`` being probabilities (sum-to-one) and ``softmax``
        of them; the mean probability of the best class before and after; and the share of the pixels on which the
        members disagree that go to B.
    """
    streams = []
    for config, weights in ((args.config_file, args.weights), (args.member_config, args.member_weights)):
        cfg = load_config(config, ["MODEL.WEIGHTS", str(weights), *args.set])
        streams.append(build_score_stream(cfg))
    classes = len(get_class_names(args.dataset))
    ignore_label = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    names = ("A", "B", "A + B", "softmax(A) + B", "A + softmax(B)", "softmax(A) + softmax(B)")
    confusion = {name: np.zeros((classes, classes), dtype=np.int64) for name in names}
    to_b = dict.fromkeys(names, 0)
    disagreed, best, frames = 0, [0.0, 0.0], 0
    single = [{**record, "frames": [frame]} for record in get_records(args.dataset) for frame in record["frames"]]
    both = zip(*(stream_videos(stream, single[::every]) for stream in streams), strict=True)
    for (clips, ((a,),)), (_, ((b,),)) in both:
        (clip,) = clips
        a, b = (normalize_scores(scores, "sum-to-one") for scores in (a, b))
        flat_a, flat_b = a.softmax(0), b.softmax(0)
        best = [best[0] + float(a.amax(0).mean()), best[1] + float(flat_a.amax(0).mean())]
        frames += 1
        maps = dict(zip(names, (a, b, a + b, flat_a + b, a + flat_b, flat_a + flat_b), strict=True))
        labels = {name: scores.argmax(0) for name, scores in maps.items()}
        differ = labels["A"] != labels["B"]
        disagreed += int(differ.sum())
        for name, found in labels.items():
            to_b[name] += int((found == labels["B"])[differ].sum())
            confusion[name] += confusion_matrix(found, clip.labels[0], classes, ignore_label)
    return {
        "frames": frames,
        "mIoU": {name: 100 * iou_from_confusion(matrix)["mIoU"] for name, matrix in confusion.items()},
        "share to B": {name: count / max(disagreed, 1) for name, count in to_b.items()},
        "best class of A, before and after": [total / frames for total in best],
    }


def measure(args: argparse.Namespace, overrides: Overrides) -> dict[str, Any]:
    """Evaluate once; figures in percent, and seconds of processor time per frame."""
    options = ["MODEL.WEIGHTS", str(args.weights), "DATALOADER.NUM_WORKERS", 0, "TEST.BOUNDARY_RATIO", 0.02, *args.set]
    cfg = load_config(args.config_file, [*options, *overrides])
    model = trained(cfg, datasets=[args.dataset])
    frames = sum(len(record["frames"]) for record in get_records(args.dataset))
    start = time.process_time()
    results = evaluate_dataset(cfg, model, args.dataset)["sem_seg"]
    seconds = (time.process_time() - start) / frames
    row = {name: results[name] for name in FIGURES} | {"seconds": seconds, "overrides": [str(x) for x in overrides]}
    print(row, file=sys.stderr, flush=True)
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| method | mIoU | boundary IoU | pixel accuracy | VC8 | VC16 | s/frame |", "|---|" + "---|" * 6]
    for name, row in rows.items():
        figures = " | ".join(f"{row[figure]:.2f}" for figure in FIGURES)
        lines.append(f"| {name} | {figures} | {row['seconds']:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
