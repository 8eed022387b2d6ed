#!/usr/bin/env python
"""How often a model distinguishes the look-alikes of moving_shapes, in clear and in degraded frames.

benchmarks/look_alikes.py --config-file configs/moving_shapes/v3_video.yaml \\
    MODEL.WEIGHTS output/demo/temporal/model_final.pth

Counts the pixels of a shape that are predicted as one of the two classes of its pair, and the share that is correct;
half is chance level. The files do not tell which frames are degraded, so the videos are drawn again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from the_mask.data import get_records
from the_mask.data.datasets import dataset_root
from the_mask.data.shapes import SHAPES
from the_mask.data.synthetic import FIRST_SHAPE_VALUE, MANIFEST, SceneSize, render_video
from the_mask.engine import RunOptions, exit_code
from the_mask.evaluation.loop import tile_videos
from the_mask.weights import trained

SPLIT = 1
# Class ids are PNG values less one, as 0 is void.
FIRST_SHAPE = FIRST_SHAPE_VALUE - 1


def spoiled_frames(dataset: str = "moving_shapes_val") -> dict[str, list[bool]]:
    """Video id -> per frame whether it is spoiled.

    Args:
        dataset: the validation videos of a version of the set.

    Raises:
        FileNotFoundError: there is no moving_shapes.
    """
    settings = json.loads((dataset_root() / dataset.removesuffix("_val") / MANIFEST).read_text(encoding="utf-8"))
    size = SceneSize(settings["frames"], settings["height"], settings["width"])
    videos = [record["video_id"] for record in get_records(dataset)]
    seed, version = settings["seed"], settings["version"]
    return {video: list(render_video(seed, SPLIT, n, size, version).spoiled) for n, video in enumerate(videos)}


@torch.no_grad()
def count(options: RunOptions) -> Counter[tuple[int, bool, bool]]:
    """Pixels by (pair, frame is spoiled, right one of the pair)."""
    cfg = options.load()
    dataset = cfg.DATASETS.TEST[0]
    model: Any = trained(cfg, datasets=[dataset])
    spoiled = spoiled_frames(dataset)
    pixels: Counter[tuple[int, bool, bool]] = Counter()
    for clips, maps in tile_videos(cfg, model, dataset):
        for clip, predictions in zip(clips, maps, strict=True):
            for file, predicted, label in zip(clip.file_names, predictions, clip.labels, strict=True):
                if label is None:
                    continue
                predicted, truth = predicted.long() - FIRST_SHAPE, label.long() - FIRST_SHAPE
                bad = spoiled[clip.video_id][int(Path(file).stem)]
                for pair in range(len(SHAPES) // 2):
                    told = (truth // 2 == pair) & (predicted // 2 == pair)
                    right = int((told & (predicted == truth)).sum())
                    pixels[pair, bad, True] += right
                    pixels[pair, bad, False] += int(told.sum()) - right
    return pixels


def share(pixels: Counter[tuple[int, bool, bool]], pairs: Sequence[int], bad: bool) -> float:
    """Percentage of right ones among the pixels of some pairs."""
    right, wrong = (sum(pixels[pair, bad, truth] for pair in pairs) for truth in (True, False))
    return 100 * right / max(right + wrong, 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="YAML")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides, at the end")
    args = parser.parse_args(arguments)

    def run() -> None:
        pixels = count(RunOptions(args.config_file, args.opts, eval_only=True))
        pairs = list(range(len(SHAPES) // 2))
        groups = {f"{SHAPES[2 * pair]} / {SHAPES[2 * pair + 1]}": [pair] for pair in pairs} | {"all": pairs}
        rows = [[name, share(pixels, group, False), share(pixels, group, True)] for name, group in groups.items()]
        print(tabulate(rows, ["pair", "clear frames %", "spoiled frames %"], floatfmt=".1f", tablefmt="pipe"))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
