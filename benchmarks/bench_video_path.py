#!/usr/bin/env python3
"""Cost of a video besides the network, step by step, in milliseconds of processor time per frame.

decode (compressed to planes), rgb (planes to RGB), normalise (uint8 to floats of a network), draw (overlay and legend),
encode. The network and its label map are measured by tools/benchmark.py.

Example:
    benchmarks/bench_video_path.py --size 480x864 --json path.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import torch

import the_mask.modeling  # noqa: F401  fills the registries
from the_mask.config import load_config
from the_mask.data.classes import load_class_list
from the_mask.inference.benchmark import latencies, machine
from the_mask.inference.demo import DemoStyle, FrameAnnotator
from the_mask.inference.live.sources import open_source
from the_mask.inference.live.video_file import VideoDecoder
from the_mask.inference.rendering.render import Palette
from the_mask.inference.rendering.video_writer import VideoWriter
from the_mask.inference.stream import build_random

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "debug" / "gsvnet_debug.yaml"


def moving_picture(path: Path, height: int, width: int, frames: int) -> None:
    """A video of smooth colours and noise that move."""
    rng = np.random.default_rng(0)
    wide = cv2.resize(rng.integers(0, 256, (height // 16, width // 8, 3)).astype(np.uint8), (2 * width, height))
    wide = np.clip(wide + rng.normal(0, 4, wide.shape), 0, 255).astype(np.uint8)
    with VideoWriter(path, 25) as writer:
        for number in range(frames):
            writer.write(np.ascontiguousarray(wide[:, 2 * number : 2 * number + width]))


def clock(items: Sequence[Any], function: Callable[[Any], object]) -> dict[str, float]:
    """Processor time of a function on each item, as :func:`latencies`."""
    seconds = []
    for item in items:
        start = time.process_time()
        function(item)
        seconds.append(time.process_time() - start)
    return latencies(seconds)


def measure(height: int, width: int, frames: int) -> dict[str, dict[str, float]]:
    """All steps, for frames of one size."""
    classes = load_class_list("camvid")
    palette = Palette(classes.names, classes.colors, classes.ignore_label)
    labels = np.random.default_rng(0).integers(0, len(classes.names), (height // 60, width // 60)).astype(np.uint8)
    labels = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST).astype(np.uint8)
    segmentor: Any = build_random(load_config(CONFIG)).segmentor
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "given.mp4"
        moving_picture(path, height, width, frames)
        decoder = VideoDecoder(str(path), None, None, 1)
        start = time.process_time()
        pictures = [shown.picture for shown in decoder._pictures()]
        table = {"decode": latencies([(time.process_time() - start) / len(pictures)])}
        table["rgb"] = clock(pictures, decoder._image)
        decoder.close()
        with open_source(path) as source:
            images = list(source)
        tensors = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in images]
        table["normalise"] = clock(tensors, lambda x: segmentor.stack([{"frames": [x]}]))
        annotator = FrameAnnotator(palette, DemoStyle(), 25)
        table["draw"] = clock(images, lambda x: annotator.draw(x, labels))
        drawn = annotator.draw(images[0], labels)
        start = time.process_time()
        with VideoWriter(Path(folder) / "out.mp4", 25) as writer:
            for _ in images:
                writer.write(drawn)
        table["encode"] = latencies([(time.process_time() - start) / len(images)])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["480x864", "720x1280"], metavar="HxW")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "threads": torch.get_num_threads(), "sizes": {}}
    print(f"{'':12}{'step':12}{'median ms':>10}")
    for size in args.size:
        height, width = map(int, size.split("x"))
        report["sizes"][size] = measure(height, width, args.frames)
        for step, row in report["sizes"][size].items():
            print(f"{size:12}{step:12}{row['p50_ms']:10.2f}")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
