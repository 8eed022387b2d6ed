"""Problems and contenders of bench_ops.py.

Axes: ``N`` batch, ``S`` positions of all levels, ``M`` heads, ``D`` channels per head or group, ``Q`` queries, ``L``
levels, ``P`` points, ``G`` groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from op_baseline import scalar_dcnv3, scalar_ms_deform_attn
from torch import Tensor
from torch.nn import functional as F

from the_mask.ops import dcnv3, ms_deform_attn, use

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Problem:
    """One set of arguments: leaves that need gradients, and the functions of the contenders."""

    name: str
    line: str  # which goal it belongs to
    leaves: tuple[Tensor, ...]
    contenders: dict[str, Call]
    bytes_moved: int  # every argument read once and the output written once
    multiply_adds: int

    def forward(self, name: str) -> Callable[[], object]:
        """The contender without gradients."""
        call = self.contenders[name]

        def run() -> object:
            with torch.no_grad():
                return call()

        return run

    def forward_backward(self, name: str) -> Callable[[], object]:
        """The contender with the gradients of all leaves."""
        call = self.contenders[name]
        with torch.no_grad():
            grad = torch.randn_like(call())

        def run() -> object:
            output = call()
            return output, torch.autograd.grad(output, self.leaves, grad)

        return run


# Mask2Former's encoder: strides 32, 16, 8.
LEVELS = {"480x853": ((15, 27), (30, 54), (60, 107)), "240x427": ((8, 14), (15, 27), (30, 54))}
# Size, groups, channels per group of the stages of InternImage at 480x853.
STAGES = {
    "T1": (120, 214, 4, 16),
    "T2": (60, 107, 8, 16),
    "T3": (30, 54, 16, 16),
    "T4": (15, 27, 32, 16),
    "H1": (120, 214, 10, 32),
    "H2": (60, 107, 20, 32),
    "H3": (30, 54, 40, 32),
    "H4": (15, 27, 80, 32),
}
DCN_LINES = {"T": "dcnv3 T", "H1": "dcnv3 H1-2", "H2": "dcnv3 H1-2", "H3": "dcnv3 H3-4", "H4": "dcnv3 H3-4"}


def on_path(path: str, call: Call) -> Call:
    """The library's operator on one of its paths."""

    def run() -> Tensor:
        with use(path):
            return call()

    return run


def plain_ms_deform_attn(value: Tensor, levels: Sequence[tuple[int, int]], places: Tensor, weights: Tensor) -> Tensor:
    """The usual implementation without a kernel: one grid_sample per level, all samples at once, a weighted sum."""
    batch, _, heads, channels = value.shape
    queries, points = places.shape[1], len(levels) * places.shape[4]
    grid = (2 * places - 1).transpose(1, 2).flatten(0, 1)
    samples = []
    for level, part in enumerate(value.split([height * width for height, width in levels], dim=1)):
        image = part.flatten(2).transpose(1, 2).reshape(batch * heads, channels, *levels[level])
        samples.append(F.grid_sample(image, grid[:, :, level], "bilinear", "zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, points)
    summed = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)
    return summed.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


def encoder_problem(size: str, batch: int, kind: str, dtype: torch.dtype, device: torch.device) -> Problem:
    """The encoder of Mask2Former: every position is a query; 8 heads of 32, 4 points.

    ``realistic``: offsets of standard deviation 2 pixels of the level around the query's own place, as in a trained
    model; ``random``: uniform over the image.
    """
    generator = torch.Generator().manual_seed(0)
    levels, heads, channels, points = LEVELS[size], 8, 32, 4
    positions = sum(height * width for height, width in levels)
    value = torch.randn(batch, positions, heads, channels, generator=generator)
    shape = (batch, positions, heads, len(levels), points)
    weights = torch.randn(*shape[:3], len(levels) * points, generator=generator).softmax(-1).view(shape)
    if kind == "random":
        places = torch.rand(*shape, 2, generator=generator)
    else:
        centers = []
        for height, width in levels:
            y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
            centers.append(torch.stack((x / width, y / height), dim=-1).flatten(0, 1))
        extent = torch.tensor([[width, height] for height, width in levels], dtype=torch.float32)
        places = torch.randn(*shape, 2, generator=generator) * 2 / extent[:, None]
        places = places + torch.cat(centers)[None, :, None, None, None]
    v, p, w = (leaf.to(device) for leaf in (value.to(dtype), places, weights))
    leaves = tuple(leaf.requires_grad_() for leaf in (v, p, w))

    def ours() -> Tensor:
        return ms_deform_attn(v, levels, None, p, w)

    contenders: dict[str, Call] = {path: on_path(path, ours) for path in ("compiled", "portable", "reference")}
    if dtype == torch.float32:
        compiled = torch.compile(plain_ms_deform_attn)
        contenders["core"] = lambda: plain_ms_deform_attn(v, levels, p, w)
        contenders["torch.compile of core"] = lambda: compiled(v, levels, p, w)
        peer = transformers_function()
        if peer is not None:
            contenders["transformers"] = lambda: peer(v, list(levels), p, w)
    if device.type == "cuda":
        contenders["scalar CUDA"] = lambda: scalar_ms_deform_attn(v, levels, p, w)
    samples = batch * positions * heads * len(levels) * points
    moved = v.numel() * 2 * v.element_size() + (p.numel() + w.numel()) * 4
    return Problem(
        f"msda {size} batch {batch} {kind}" + ("" if dtype == torch.float32 else f" {dtype}".replace("torch.", "")),
        f"msda {kind}",
        leaves,
        contenders,
        moved,
        samples * 4 * channels,
    )


def transformers_function() -> Callable[..., Tensor] | None:
    """The pure PyTorch function of Hugging Face, if it is installed."""
    try:
        from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention
    except ImportError:
        return None
    return multi_scale_deformable_attention


def plain_dcnv3(x: Tensor, offset: Tensor, mask: Tensor, groups: int) -> Tensor:
    """The usual implementation without a kernel: one grid_sample of all points, a weighted sum. 3x3, padding 1."""
    batch, height, width, channels = x.shape
    steps = torch.arange(-1, 2, dtype=x.dtype, device=x.device)
    taps = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).flatten(0, 1)
    columns = torch.arange(width, dtype=x.dtype, device=x.device)
    rows = torch.arange(height, dtype=x.dtype, device=x.device)
    centers = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    places = centers[:, :, None, None] + taps + offset.view(batch, height, width, groups, 9, 2)
    grid = (2 * places + 1) / places.new_tensor([width, height]) - 1
    grid = grid.permute(0, 3, 1, 2, 4, 5).reshape(batch * groups, height * width, 9, 2)
    image = x.flatten(1, 2).transpose(1, 2).reshape(batch * groups, channels // groups, height, width)
    sample = F.grid_sample(image, grid, "bilinear", "zeros", align_corners=False)
    weight = mask.view(batch, height * width, groups, 9).transpose(1, 2).reshape(batch * groups, 1, height * width, 9)
    summed = (sample * weight).sum(-1).view(batch, channels, height * width)
    return summed.transpose(1, 2).reshape(batch, height, width, channels).contiguous()


def torchvision_dcnv3(x: Tensor, offset: Tensor, mask: Tensor, groups: int) -> Tensor:
    """DCNv3 as a depthwise deformable convolution; its layout (NCHW, row by row, (y, x)) is converted every time."""
    from torchvision.ops import deform_conv2d

    batch, height, width, channels = x.shape
    moved = offset.view(batch, height, width, groups, 3, 3, 2).transpose(4, 5).flip(-1).flatten(3)
    mask = mask.view(batch, height, width, groups, 3, 3).transpose(4, 5).flatten(3)
    ones = torch.ones(channels, 1, 3, 3, dtype=x.dtype, device=x.device)
    image, moved, mask = (tensor.permute(0, 3, 1, 2).contiguous() for tensor in (x, moved, mask))
    return deform_conv2d(image, moved, ones, padding=1, mask=mask).permute(0, 2, 3, 1)


def stage_problem(stage: str, dtype: torch.dtype, device: torch.device) -> Problem:
    """One DCNv3 of InternImage at 480x853: 3x3, padding 1; offsets of standard deviation 1 pixel."""
    generator = torch.Generator().manual_seed(0)
    height, width, groups, channels = STAGES[stage]
    x = torch.randn(1, height, width, groups * channels, generator=generator)
    offset = torch.randn(1, height, width, groups * 18, generator=generator)
    mask = torch.randn(1, height, width, groups, 9, generator=generator).softmax(-1).flatten(3)
    x, offset, mask = x.to(device, dtype), offset.to(device), mask.to(device)
    leaves = tuple(leaf.requires_grad_() for leaf in (x, offset, mask))

    def ours() -> Tensor:
        return dcnv3(x, offset, mask, 3, 1, 1, 1, groups, 1.0)

    contenders: dict[str, Call] = {path: on_path(path, ours) for path in ("compiled", "portable", "reference")}
    if dtype == torch.float32:
        compiled = torch.compile(plain_dcnv3)
        contenders["core"] = lambda: plain_dcnv3(x, offset, mask, groups)
        contenders["torch.compile of core"] = lambda: compiled(x, offset, mask, groups)
        contenders["torchvision"] = lambda: torchvision_dcnv3(x, offset, mask, groups)
    if device.type == "cuda":
        contenders["scalar CUDA"] = lambda: scalar_dcnv3(x, offset, mask, groups)
    moved = x.numel() * 2 * x.element_size() + (offset.numel() + mask.numel()) * 4
    return Problem(
        f"dcnv3 {stage}" + ("" if dtype == torch.float32 else f" {dtype}".replace("torch.", "")),
        DCN_LINES.get(stage, DCN_LINES.get(stage[0], "")),
        leaves,
        contenders,
        moved,
        x.numel() * 9 * 4,
    )
