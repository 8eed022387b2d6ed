"""Modules to export: wrappers around a segmentor that take and return only tensors.

Axes: K classes, H W size of the frame, h w cells of the score map.

Frames are float32 [3, H, W], RGB 0..255, resized to the network size by the caller; normalisation and padding are
inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.export.states import State, named_tensors, settle, sources_of, with_tensors
from the_mask.modeling.propagation.propagated import PropagatedSegmentor
from the_mask.modeling.segmentor import Segmentor
from the_mask.ops import decomposed

OUTPUTS = ("scores", "labels")


@dataclass
class Program:
    """A module to export, with an example of its arguments.

    Attributes:
        name: "image", "start", "step" or "key".
        module: ``forward(*arguments)`` gives a tuple of tensors.
        arguments: example.
        inputs, outputs: names of arguments and results.
        dynamic: whether H and W may vary, in multiples of ``multiple``.
        multiple: in pixels.
    """

    name: str
    module: nn.Module
    arguments: tuple[Tensor, ...]
    inputs: list[str]
    outputs: list[str]
    dynamic: bool = False
    multiple: int = 1


@contextlib.contextmanager
def exportable() -> Iterator[None]:
    """Inside the block, models run in standard operators and without gradients."""
    with decomposed(), torch.no_grad():
        yield


def finish(scores: Tensor, output: str, stride: int, height: int, width: int) -> Tensor:
    """Scores [K, h, w] unchanged, or labels [H, W] int32 by bilinear upsampling and argmax."""
    if output == "scores":
        return scores
    size = (scores.shape[-2] * stride, scores.shape[-1] * stride)
    large = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]
    return large[:, :height, :width].argmax(dim=0).to(torch.int32)


class ImageProgram(nn.Module):
    """A single frame: [3, H, W] -> scores [K, ceil(H/stride), ceil(W/stride)] or labels [H, W]."""

    def __init__(self, model: Segmentor, output: str = "scores", pad: bool = True) -> None:
        """``pad``: accept any fixed size; without it, sizes must be multiples of ``size_divisibility``."""
        super().__init__()
        self.model, self.output, self.pad = model, output, pad

    def forward(self, frame: Tensor) -> tuple[Tensor]:
        model, (height, width) = self.model, (frame.shape[1], frame.shape[2])
        images = (frame[None] - model.pixel_mean) / model.pixel_std
        if self.pad:
            multiple = model.size_divisibility
            images = F.pad(images, (0, -width % multiple, 0, -height % multiple))
        (scores,) = model.group_scores(images, 1)
        scores = scores[0]
        if self.pad:
            scores = model.crop_scores(scores, height, width)
        return (finish(scores, self.output, model.score_stride, height, width),)


Step = Callable[[Tensor, State], tuple[Tensor, State]]


class StartProgram(nn.Module):
    """The first frame of a stream: [3, H, W] -> scores or labels, and the tensors of the state."""

    def __init__(self, model: Segmentor, step: Step, state: State, sources: Sequence[int], output: str) -> None:
        super().__init__()
        self.model, self.step, self.output = model, step, output
        self.state, self.sources = state, list(sources)

    def forward(self, frame: Tensor) -> tuple[Tensor, ...]:
        scores, state = self.step(frame, self.state)
        tensors = [tensor for _, tensor in named_tensors(state)]
        result = finish(scores, self.output, self.model.score_stride, frame.shape[1], frame.shape[2])
        return (result, *(tensors[i].clone() for i in self.sources))


class StepProgram(nn.Module):
    """The next frame of a stream: [3, H, W] and the state's tensors -> scores or labels, and the new ones."""

    def __init__(self, model: Segmentor, step: Step, template: State, output: str) -> None:
        super().__init__()
        self.model, self.step, self.output = model, step, output
        self.template = template

    def forward(self, frame: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        scores, state = self.step(frame, with_tensors(self.template, tensors))
        result = finish(scores, self.output, self.model.score_stride, frame.shape[1], frame.shape[2])
        return (result, *(tensor.clone() for _, tensor in named_tensors(state)))


def image_program(model: Segmentor, size: tuple[int, int], output: str = "scores", dynamic: bool = False) -> Program:
    """The program of a segmentor for single frames.

    Args:
        model: in eval mode.
        size: (H, W) of the frames; with ``dynamic`` of the example.
        output: "scores" or "labels".
        dynamic: also allow other sizes, in multiples of the model's ``size_divisibility``.

    Raises:
        ValueError: unknown output, a size below 1, or one that ``dynamic`` does not allow.
    """
    multiple = model.size_divisibility
    _check(model, size, output)
    if dynamic and (size[0] % multiple or size[1] % multiple):
        raise ValueError(f"size {size[0]}x{size[1]}: sizes that may vary are multiples of {multiple} pixels")
    module = ImageProgram(model, output, pad=not dynamic).eval()
    return Program("image", module, (example_frame(size),), ["frame"], [output], dynamic, multiple)


def stream_programs(model: Segmentor, size: tuple[int, int], output: str = "scores") -> list[Program]:
    """The programs of a segmentor for streams: "start" for the first frame, "step" for the others, with explicit state.

    The stream behaves as if its first frame had been repeated before, as far as the state reaches back. A
    ``PropagatedSegmentor`` gives "start", "step" (a propagated frame) and "key" (a later keyframe); the caller chooses
    which one to run.

    Args: see :func:`image_program`.

    Raises:
        ValueError: see there; or a state that keeps growing.
    """
    _check(model, size, output)
    steps = _steps(model)
    frame = example_frame(size)
    with exportable():
        empty = model.init_state()
        first, full = settle(lambda state: steps["step" if state is not empty else "start"](frame, state)[1], empty)
        sources = sources_of(full, first)
        names = [f"state.{name}" for name, _ in named_tensors(full)]
        tensors = [tensor.clone() for _, tensor in named_tensors(full)]
    if not names:
        raise ValueError(f"{type(model).__name__} keeps nothing between frames: export it as an image model")
    outputs = [output, *(f"new_{name}" for name in names)]
    start = StartProgram(model, steps["start"], empty, sources, output).eval()
    programs = [Program("start", start, (frame,), ["frame"], outputs)]
    for name in [key for key in steps if key != "start"]:
        module = StepProgram(model, steps[name], full, output).eval()
        programs.append(Program(name, module, (frame, *tensors), ["frame", *names], outputs))
    return programs


def example_frame(size: tuple[int, int]) -> Tensor:
    """A smooth frame [3, H, W], 0..255, always the same."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size[0]), torch.linspace(0, 1, size[1]), indexing="ij")
    return 127.5 + 127.5 * torch.stack([(7 * x + 2 * y).sin(), (5 * y - 3 * x).cos(), (11 * x * y).sin()])


def _steps(model: Segmentor) -> dict[str, Step]:
    if not isinstance(model, PropagatedSegmentor):
        return {"start": model.step, "step": model.step}

    def key(frame: Tensor, state: State) -> tuple[Tensor, State]:
        (state,) = model.key_step([frame], [state])
        return model.output(state), state

    def propagate(frame: Tensor, state: State) -> tuple[Tensor, State]:
        (state,) = model.propagate(model.small_frames([frame]), [state])
        return model.output(state), state

    return {"start": key, "step": propagate, "key": key}


def _check(model: Segmentor, size: tuple[int, int], output: str) -> None:
    if output not in OUTPUTS:
        raise ValueError(f"output {output!r}: expected one of {', '.join(OUTPUTS)}")
    if min(size) < 1:
        raise ValueError(f"size {size[0]}x{size[1]}: expected at least 1 pixel a side")
    if model.training:
        raise ValueError("the model is in training mode; call eval() before exporting it")
    if model.device.type != "cpu":
        raise ValueError(f"the model is on {model.device}; programs are exported on the CPU (MODEL.DEVICE cpu)")
