"""Time and memory of encoder-only models compared with transformers' EoMT and VidEoMT, with the same weights.

Prints medians and ratios of one run, in which contenders alternate, and writes JSON. Parts:

- ``video``: a clip of frames, eval: ``VideomtForUniversalSegmentation`` against the clip here, per frame;
- ``image``: one frame, eval: ``EomtForUniversalSegmentation`` (without attention masks) against ours;
- ``step``: a frame of a stream against a frame of the image model, both ours;
- ``train``: forward, loss and backward of one image: theirs with its loss, ours with ours;
- ``memory``: memory growth of a process in ``video``, each contender in a separate process.

    python benchmarks/bench_encoder.py --models S B --threads 2

On a busy machine ``--clock process`` counts processor time instead of wall time. ``--compile`` adds both compiled by
``torch.compile``, in ``video`` and ``image``, and the seconds of their first call, which compiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from common import machine, peak_memory, write_json
from timing import quartiles, ratio
from torch import Tensor

import the_mask.modeling  # noqa: F401  (fills the registries)
from the_mask.config import load_config
from the_mask.data.clips import Clip
from the_mask.modeling.build import build_segmentor
from the_mask.weights.converters import check, convert

MODELS = {"T": ("small", 192, 12, 3, 3), "S": ("small", 384, 12, 6, 3), "B": ("base", 768, 12, 12, 3)}
MODELS["L"] = ("large", 1024, 24, 16, 4)
COMPILED = ", compiled"
PARTS = ("video", "image", "step", "train", "memory")


def our_model(args: argparse.Namespace, name: str, video: bool) -> Any:
    """Our model of a size, in eval mode."""
    kind, width, depth, heads, blocks = MODELS[name]
    overrides = {
        "MODEL.DEVICE": "cpu",
        "MODEL.META_ARCHITECTURE": "EncoderSegmentor",
        "MODEL.BACKBONE.NAME": "build_vit_backbone",
        "MODEL.VIT.NAME": f"vit_{kind}_patch14_reg4_dinov2",
        "MODEL.VIT.IMG_SIZE": args.side,
        "MODEL.VIT.WIDTH": width,
        "MODEL.VIT.DEPTH": depth,
        "MODEL.VIT.HEADS": heads,
        "MODEL.ENCODER.NUM_BLOCKS": blocks,
        "MODEL.ENCODER.PROPAGATE": video,
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": args.queries,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": args.classes,
    }
    cfg = load_config(None, [str(word) for item in overrides.items() for word in item])
    torch.manual_seed(0)
    return build_segmentor(cfg).eval()


def their_model(args: argparse.Namespace, name: str, video: bool) -> Any:
    """transformers' model of a size, in eval mode, without attention masks."""
    import transformers

    _, width, depth, heads, blocks = MODELS[name]
    kind = "Videomt" if video else "Eomt"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=args.side,
        num_blocks=blocks,
        num_queries=args.queries,
        num_labels=args.classes,
    )
    model = getattr(transformers, f"{kind}ForUniversalSegmentation")(config)
    model.attn_mask_probs.zero_()
    return model.eval()


def pair(args: argparse.Namespace, name: str, video: bool) -> tuple[Any, Any]:
    """Both, with the same weights."""
    theirs, ours = their_model(args, name, video), our_model(args, name, video)
    ours.load_state_dict(check(convert(theirs.state_dict())).state, strict=False)
    return theirs, ours


def frames_of(args: argparse.Namespace, count: int) -> Tensor:
    return torch.randn(count, 3, args.side, args.side, generator=torch.Generator().manual_seed(0))


def clip_masks(model: Any, images: Tensor, step: Callable[..., Any]) -> list[tuple[Tensor, Tensor]]:
    """Logits and masks of the frames of one clip, as a stream computes them; ``step``: the model's, or it compiled."""
    carried, results = model._fresh(1), []
    for t in range(len(images)):
        logits, masks, carried = step(images[t : t + 1], carried)
        results.append((logits, masks))
    return results


def contenders(args: argparse.Namespace, name: str, part: str) -> dict[str, Callable[[], object]]:
    """The contenders of a part; the first is the reference."""
    if part == "step":
        video, image = our_model(args, name, True), our_model(args, name, False)
        (frame,) = (frames_of(args, 1) * 50 + 120).clamp(0, 255)
        _, state = video.step(frame, video.init_state())
        still = image.init_state()
        return {"image": lambda: image.step(frame, still), "ours": lambda: video.step(frame, state)}
    if part == "train":
        return training(args, name)
    is_video = part in ("video", "memory")
    images = frames_of(args, args.frames if is_video else 1)
    theirs, ours = pair(args, name, is_video)
    ours.options = replace(ours.options, class_logits="per-frame")
    clip = images[None] if is_video else images
    found: dict[str, Callable[[], object]] = {"transformers": lambda: theirs(clip)}
    found["ours"] = lambda: clip_masks(ours, images, ours._next)
    if args.compile and part != "memory":
        their_program, our_program = torch.compile(theirs), torch.compile(ours._next)
        found[f"transformers{COMPILED}"] = lambda: their_program(clip)
        found[f"ours{COMPILED}"] = lambda: clip_masks(ours, images, our_program)
    return found


def training(args: argparse.Namespace, name: str) -> dict[str, Callable[[], object]]:
    """One training step each, attention masks on, without the optimiser."""
    theirs, ours = pair(args, name, False)
    theirs.attn_mask_probs.fill_(1.0)
    theirs.train()
    ours.train()
    labels = torch.randint(args.classes, (6, 6), generator=torch.Generator().manual_seed(1))
    labels = labels.repeat_interleave(args.side // 6 + 1, 0).repeat_interleave(args.side // 6 + 1, 1)
    labels = labels[: args.side, : args.side].contiguous()
    classes = labels.unique()
    masks = torch.stack([labels == c for c in classes]).float()
    frame = (frames_of(args, 1)[0] * 50 + 120).clamp(0, 255)
    clip = Clip([frame], [labels])
    images, _ = ours.stack([clip])

    def step_theirs() -> None:
        theirs(images, mask_labels=[masks], class_labels=[classes]).loss.backward()
        theirs.zero_grad(set_to_none=True)

    def step_ours() -> None:
        torch.stack(list(ours.losses([clip]).values())).sum().backward()
        ours.zero_grad(set_to_none=True)

    return {"transformers": step_theirs, "ours": step_ours}


def measure(args: argparse.Namespace, name: str, part: str) -> dict[str, Any]:
    """Times of one part; the contenders alternate in every round."""
    clock = time.process_time if args.clock == "process" else time.perf_counter
    runs = contenders(args, name, part)
    times: dict[str, list[float]] = {who: [] for who in runs}
    with torch.set_grad_enabled(part == "train"):
        for _ in range(args.rounds + 1):
            for who, function in runs.items():
                start = clock()
                function()
                times[who].append(clock() - start)
    first = {who: round(values[0], 1) for who, values in times.items() if who.endswith(COMPILED)}
    count = args.frames if part == "video" else 1
    times = {who: [value / count for value in values[1:]] for who, values in times.items()}
    reference, *others = times
    row: dict[str, Any] = {who: quartiles(values) for who, values in times.items()}
    row["times as fast"] = {who: round(ratio(times[reference], times[who]), 3) for who in others}
    if first:
        row["first call, s"] = first
    return row


def memory(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Growth of a fresh process per contender, MiB."""
    found: dict[str, float] = {}
    for who in ("transformers", "ours"):
        command = [sys.executable, __file__, "--models", name, "--only", who]
        for key in ("side", "frames", "queries", "classes", "threads"):
            command += [f"--{key}", str(getattr(args, key))]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        found[who] = round(int(output.split()[-1]) / 2**20, 1)
    return {"MiB": found, "share": round(found["ours"] / found["transformers"], 3)}


def difference(args: argparse.Namespace, name: str) -> float:
    """Largest difference of the masks of a clip, relative to the largest mask logit."""
    theirs, ours = pair(args, name, True)
    images = frames_of(args, 2)
    with torch.no_grad():
        expected = theirs(images[None]).masks_queries_logits
        found = torch.cat([masks for _, masks in clip_masks(ours, images, ours._next)])
    return float((found - expected).abs().max() / expected.abs().max())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["S", "B"], choices=list(MODELS))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--side", type=int, default=480, help="pixels, a multiple of 16")
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--classes", type=int, default=124)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", default="encoder_cpu", help="name of the JSON below benchmarks/results")
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.only:
        function = contenders(args, args.models[0], "memory")[args.only]
        with torch.no_grad():
            print(peak_memory(function))
        return 0
    settings = {key: getattr(args, key) for key in ("side", "frames", "queries", "classes", "threads", "clock")}
    report: dict[str, Any] = {"machine": machine(), "settings": settings}
    for name in args.models:
        rows = {part: memory(args, name) if part == "memory" else measure(args, name, part) for part in args.parts}
        report[name] = {**rows, "largest relative difference": difference(args, name)}
        print(name, json.dumps(report[name], indent=1))
    print(f"written: {write_json(args.output, report)}")
    speeds = [report[name]["video"]["times as fast"]["ours"] for name in args.models if "video" in args.parts]
    if speeds:
        print(f"video, per frame: {statistics.geometric_mean(speeds):.2f} times as fast as transformers")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
