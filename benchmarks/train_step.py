"""Processor time of one training step of a config on a CPU, and the gain of each optimisation.

The optimisations are added one after the other: channels last, bfloat16, the fast gradient of large depthwise kernels,
and memory that glibc keeps instead of returning it to the system after each layer (every new page costs a page fault).
Each run is a separate process; they alternate in every round, so that the load of the machine affects all of them.

    python benchmarks/train_step.py --config-file configs/camvid/street_live_frame.yaml --size 320 416 --batch 8
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any
from unittest import mock

from common import machine, write_json

from the_mask.data.clips import Clip

PLAIN = ["MODEL.CHANNELS_LAST", "False", "SOLVER.AMP.ENABLED", "False"]
CHANNELS_LAST = ["MODEL.CHANNELS_LAST", "True", "SOLVER.AMP.ENABLED", "False"]
BF16 = ["MODEL.CHANNELS_LAST", "True", "SOLVER.AMP.ENABLED", "True"]
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
# Label -> overrides, fast depthwise gradient, environment.
MEASURES: dict[str, tuple[list[str], bool, dict[str, str]]] = {
    "float32": (PLAIN, False, {}),
    "+ channels last": (CHANNELS_LAST, False, {}),
    "+ bfloat16": (BF16, False, {}),
    "+ depthwise gradient": (BF16, True, {}),
    "+ kept memory": (BF16, True, KEEP_MEMORY),
    "float32, kept memory": (PLAIN, False, KEEP_MEMORY),
}


def step_time(args: argparse.Namespace, label: str) -> float:
    """Smallest processor time of a few steps, in seconds."""
    import torch

    import the_mask.modeling  # noqa: F401  (fills the registries)
    from the_mask.config import load_config
    from the_mask.modeling.build import build_segmentor

    overrides, fast, _ = MEASURES[label]
    torch.set_num_threads(1)
    cfg = load_config(args.config_file, [*overrides, "MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", ""])
    torch.manual_seed(0)
    patch = "the_mask.modeling.backbones.timm_adapter.speed_up_depthwise"
    if fast:
        model = build_segmentor(cfg).train()
    else:
        with mock.patch(patch, return_value=None):
            model = build_segmentor(cfg).train()
    height, width = args.size
    blocks = torch.randint(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, (args.batch, height // 32, width // 32))
    labels = blocks.repeat_interleave(32, 1).repeat_interleave(32, 2)
    frames = torch.randint(256, (args.batch, 3, *labels.shape[1:]), dtype=torch.uint8)
    clips = [Clip([frame], [label], seed=i, video_id=str(i)) for i, (frame, label) in enumerate(zip(frames, labels))]
    times = []
    for _ in range(args.steps):
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.SOLVER.AMP.ENABLED):
            losses = model(clips)
        torch.stack([value.float() for value in losses.values()]).sum().backward()
        model.zero_grad(set_to_none=True)
        times.append(time.process_time() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="configs/camvid/street_live_frame.yaml")
    parser.add_argument("--size", type=int, nargs=2, default=(320, 416), metavar=("H", "W"), help="multiples of 32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="NAME", help="also write benchmarks/results/NAME.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(step_time(args, args.one)))
        return
    times: dict[str, list[float]] = {label: [] for label in MEASURES}
    for _ in range(args.rounds):
        for label, (_, _, environment) in MEASURES.items():
            command = [sys.executable, *sys.argv, "--one", label]
            result = subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.PIPE)
            times[label].append(float(json.loads(result.stdout.splitlines()[-1])))
    first = statistics.median(times["float32"])
    rows: list[dict[str, Any]] = []
    for label, found in times.items():
        middle = statistics.median(found)
        rows.append({"measure": label, "seconds": middle, "all": found, "times_faster": first / middle})
        print(f"{label:24s} {middle:6.2f} s of processor time, {first / middle:5.2f} times as fast as float32")
    if args.json:
        write_json(args.json, {"machine": machine(), "config": args.config_file, "batch": args.batch, "rows": rows})


if __name__ == "__main__":
    main()
