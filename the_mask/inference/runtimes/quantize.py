"""int8: static quantisation after training, with the ranges that activations have on calibration frames.

Each runtime has the tool that was made for it: ONNX Runtime its own, which writes QuantizeLinear and DequantizeLinear
around what is computed in int8; OpenVINO NNCF, in OpenVINO's format. (OpenVINO 2026.4 computes some ONNX graphs of NNCF
wrong and crashes on those of ONNX Runtime; docs/experiments.md.) Both write weights per channel. Source of the method:
Jacob et al., CVPR 2018.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from the_mask.data.augmentation import resize_image
from the_mask.inference.live.sources import open_source
from the_mask.inference.runtimes.cache import weights_of
from the_mask.inference.runtimes.sessions import openvino_core
from the_mask.inference.views import MultiView
from the_mask.modeling.segmentor import Segmentor

# Frames of each clip: the networks of keyframe models have to see frames that follow one another.
CLIP_FRAMES = 4
MOST_CLIPS = 12
# Arguments of a part that are kept for calibration, at most.
MOST_BYTES = 1 << 30
# Layers whose results are computed anew in float32 from int8, so that positions after them may stay in it.
LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
# Changes when the same calls give another graph; part of the names of those in the cache.
RECIPE = 2
Clips = Sequence[Sequence[Tensor]]
Feed = dict[str, Any]


def calibration_clips(
    segmentor: MultiView, source: str | Path, size: tuple[int, int] | None = None
) -> list[list[Tensor]]:
    """Frames to calibrate with, resized as a stream resizes its own.

    Args:
        segmentor: gives the network size.
        source: a video file or a folder of frames; of long ones :data:`MOST_CLIPS` clips are taken, evenly spread.
        size: (height, width) of the stream's frames, if known. Frames that the network would see in another size are
            cut to this ratio around their centre, so that they calibrate it for the stream.

    Returns:
        Clips of up to :data:`CLIP_FRAMES` uint8 RGB frames [3, h, w].

    Raises:
        ValueError, FileNotFoundError: see :func:`the_mask.inference.live.sources.open_source`; or a live source.
    """
    clips: list[list[Tensor]] = []
    with open_source(source) as opened:
        if opened.live:
            raise ValueError(f"calibration frames from {source}: it is live; name a video file or a folder")
        between = (opened.num_frames or 0) // MOST_CLIPS - CLIP_FRAMES
        frames = iter(opened)
        while len(clips) < MOST_CLIPS:
            clip = [segmentor.prepare(_fitted(segmentor, frame, size)) for frame in islice(frames, CLIP_FRAMES)]
            if not clip:
                break
            clips.append(clip)
            for _ in islice(frames, max(between, 0)):
                pass
    return clips


def _fitted(segmentor: MultiView, frame: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """The largest centred part of a frame [H, W, 3] that has the ratio of ``size``, in that size."""
    height, width = frame.shape[:2]
    if size is None or segmentor.network_size(height, width) == segmentor.network_size(*size):
        return frame
    rows = min(height, max(1, round(width * size[0] / size[1])))
    columns = min(width, max(1, round(height * size[1] / size[0])))
    top, left = (height - rows) // 2, (width - columns) // 2
    return resize_image(frame[top : top + rows, left : left + columns], size)


def check_clips(clips: Clips | None) -> Clips:
    """The clips, if there is a frame in them.

    Raises:
        ValueError: no frames.
    """
    if not clips or not any(clips):
        raise ValueError(
            "precision int8 is calibrated on frames like those to come, and there are none: --calibrate VIDEO or FOLDER"
        )
    return clips


class Calls:
    """The arguments that a layout of a part was called with on the calibration frames; a session that runs PyTorch."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.kept: list[list[Tensor]] = []
        self._bytes = 0

    def __call__(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        size = sum(x.numel() * x.element_size() for x in arguments)
        if not self.kept or self._bytes + size <= MOST_BYTES:
            self.kept.append([x.detach().clone() for x in arguments])
            self._bytes += size
        with torch.no_grad():
            return list(self.module(*arguments))

    @functools.cached_property
    def digest(self) -> str:
        """Of all that was kept."""
        found = hashlib.sha256()
        for call in self.kept:
            for x in call:
                found.update(x.contiguous().numpy().tobytes())
        return found.hexdigest()

    def release(self) -> None:
        """Free the memory; what was made of it stays on disk."""
        self.kept = []


class _Reader:
    """Calls as ONNX Runtime's calibration wants them."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self.feeds, None)


def write_int8(graph: Path, calls: Sequence[Sequence[Tensor]], path: Path, runtime: str) -> None:
    """Quantise an ONNX graph.

    Args:
        graph: in float32.
        calls: arguments to calibrate with.
        path: where the quantised graph is written: ONNX, or OpenVINO's own format with weights in a second file.
        runtime: "onnxruntime" or "openvino", which will run it.

    Raises:
        RuntimeError: no calls (left).
    """
    if not calls:
        raise RuntimeError("the calibrated graph was removed from the cache: run the command again")
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    tool = _by_onnxruntime if runtime == "onnxruntime" else _by_nncf
    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(graph, prepared, skip_symbolic_shape=True)
        model = onnx.load(prepared)
        feeds = [_feed([x.name for x in model.graph.input], call) for call in calls]
        tool(prepared, feeds, positions(model), path)


def positions(model: Any) -> list[str]:
    """Names of an ONNX graph's nodes that compute where a GridSample reads, back to the layers that they begin with.

    In int8 they would be a large part of a cell off: it has 256 steps for the whole width.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    left = [node.input[1] for node in model.graph.node if node.op_type == "GridSample"]
    found: dict[str, None] = {}
    while left:
        node = makers.get(left.pop())
        if node is None or node.op_type in LAYERS or node.name in found:
            continue
        found[node.name] = None
        left.extend(node.input)
    return list(found)


def _by_onnxruntime(graph: Path, feeds: Sequence[Feed], keep: Sequence[str], path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    CalibrationDataReader.register(_Reader)
    quantize_static(
        graph,
        path,
        _Reader(feeds),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        # Without instructions for it, products of full 8-bit values overflow their 16-bit sums.
        reduce_range=not has_int8_products(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=list(keep),
    )


def _by_nncf(graph: Path, feeds: Sequence[Feed], keep: Sequence[str], path: Path) -> None:
    # Its switch for machines that must not report their use.
    os.environ.setdefault("NNCF_CI", "1")
    import nncf
    import openvino

    model = openvino_core().read_model(str(graph))
    there = {node.get_friendly_name() for node in model.get_ops()}
    # By default the first layer has 7-bit weights everywhere, which costs thin things up to a fifth of their IoU.
    overflow = nncf.OverflowFix.DISABLE if has_int8_products() else nncf.OverflowFix.ENABLE
    int8 = nncf.quantize(
        model,
        nncf.Dataset(feeds),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(feeds),
        ignored_scope=nncf.IgnoredScope(names=[name for name in keep if name in there]),
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=overflow),
    )
    openvino.serialize(int8, str(path), str(weights_of(path)))


def method(runtime: str) -> str:
    """What a graph in int8 depends on besides the one in float32 and the calls: versions, and the processor."""
    version = importlib.metadata.version("nncf" if runtime == "openvino" else runtime)
    return f"{RECIPE} {version} {has_int8_products()}"


def _feed(names: Sequence[str], call: Sequence[Tensor]) -> Feed:
    return {name: x.contiguous().numpy() for name, x in zip(names, call, strict=True)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside the block the tools' advice and progress are not shown."""
    loggers = [logging.getLogger(name) for name in (None, "nncf")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def has_int8_products() -> bool:
    """Whether the processor multiplies and adds int8 into int32 in one instruction (VNNI, or Arm's dot products)."""
    information = Path("/proc/cpuinfo")
    words = set(information.read_text().split()) if information.exists() else set()
    return bool(words & {"avx512_vnni", "avx_vnni", "asimddp"})


@dataclass(frozen=True)
class Accuracy:
    """Label maps of a runtime against those of PyTorch in float32, on the calibration frames.

    Attributes:
        frames: how many.
        agreement: share of the pixels (cells of the score maps) with the same label.
        iou: by class, for those that PyTorch finds; intersection over union of both, 0..1.
    """

    frames: int
    agreement: float
    iou: dict[int, float]

    def text(self, classes: Sequence[str] = ()) -> str:
        """For people, with the names of the classes."""
        names = {c: classes[c] if c < len(classes) else f"class {c}" for c in self.iou}
        table = ", ".join(f"{names[c]} {100 * value:.1f}" for c, value in self.iou.items())
        return (
            f"int8 gives {100 * self.agreement:.2f} % of the cells the label of float32 on {self.frames} calibration "
            f"frames; IoU with float32 by class: {table}"
        )


def labels_of(model: Segmentor, clips: Clips) -> list[Tensor]:
    """Label maps [h, w] of all frames, each clip a stream of its own."""
    maps = []
    for clip in clips:
        state = model.init_state()
        for frame in clip:
            scores, state = model.step(frame, state)
            maps.append(scores.argmax(dim=0))
    return maps


def compare(found: Sequence[Tensor], expected: Sequence[Tensor], num_classes: int) -> Accuracy:
    """Label maps against those of float32."""
    a, b = (torch.cat([x.flatten() for x in maps]) for maps in (found, expected))
    same = torch.bincount(b[a == b], minlength=num_classes)
    union = torch.bincount(a, minlength=num_classes) + torch.bincount(b, minlength=num_classes) - same
    seen = torch.bincount(b, minlength=num_classes).nonzero().flatten().tolist()
    iou = {c: float(same[c]) / float(union[c]) for c in seen}
    return Accuracy(len(expected), float((a == b).float().mean()), iou)
