"""The operator ``the_mask::ms_deform_attn``: checks, schema, fake kernel, gradients, and the choice of a path.

Axes: ``N`` batch, ``S`` positions of all levels, ``M`` heads, ``D`` channels per head, ``Q`` queries, ``L`` levels,
``P`` points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from the_mask.ops.checks import check_rank, check_size, check_together, is_readable, level_starts, to_levels
from the_mask.ops.msda.reference import (
    ms_deform_attn_portable,
    ms_deform_attn_python_backward,
    ms_deform_attn_reference,
)
from the_mask.ops.registration import operator
from the_mask.ops.selection import choose

_Levels = list[tuple[int, int]]
_Sizes = Sequence[int]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention: weighted sums of bilinear samples from several feature levels.

    Arithmetic and coordinates are float32 (float64 for float64 input), whatever the storage types. Gradients are
    computed for ``value``, ``sampling_locations`` and ``attention_weights``. See :mod:`the_mask.ops.sampling` for the
    boundary.

    Args:
        value: [N, S, M, D], levels concatenated; S is the sum of H*W over the levels.
        spatial_shapes: L pairs (H, W), as a list or an int64 tensor [L, 2]. A list (or a CPU tensor) is checked; a
            tensor on another device is passed on without reading it, to avoid synchronisation.
        level_start_index: [L], the exclusive cumulative sum of H*W; None computes it. Other values are refused.
        sampling_locations: [N, Q, M, L, P, 2], (x, y) in 0..1 = image edges; other values are outside.
        attention_weights: [N, Q, M, L, P]; they are not normalised here.

    Returns:
        [N, Q, M*D] in the dtype of ``value``.

    Raises:
        ValueError: shapes, sizes, dtypes or devices that do not fit; the message names them.
    """
    levels: _Levels | None = None
    device_shapes: Tensor | None = None
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2 or spatial_shapes.is_floating_point():
            raise ValueError(
                f"spatial_shapes is a {spatial_shapes.dtype} tensor of shape {tuple(spatial_shapes.shape)}: "
                "expected integers of shape [L, 2]"
            )
        if is_readable(spatial_shapes):
            levels = to_levels(spatial_shapes)
        else:
            device_shapes = spatial_shapes
    else:
        levels = to_levels(spatial_shapes)
    if levels is not None:
        _check_starts(level_start_index, levels)
    _check(value, levels, device_shapes, sampling_locations, attention_weights)

    path = choose(value.device).path
    if path == "compiled":
        sizes = [size for pair in levels for size in pair] if levels is not None else []
        return torch.ops.the_mask.ms_deform_attn(value, sizes, sampling_locations, attention_weights, device_shapes)
    if levels is None:
        assert device_shapes is not None
        levels = to_levels(device_shapes)
        _check(value, levels, None, sampling_locations, attention_weights)
    return _run_python(path, value, levels, sampling_locations, attention_weights)


def _check_starts(level_start_index: Tensor | Sequence[int] | None, levels: _Levels) -> None:
    if level_start_index is None:
        return
    if isinstance(level_start_index, Tensor):
        if not is_readable(level_start_index):
            return
        found = level_start_index.tolist()
    else:
        found = list(level_start_index)
    if found != level_starts(levels):
        raise ValueError(
            f"level_start_index={found}: expected {level_starts(levels)}, the positions where levels of spatial_shapes "
            f"{levels} begin when concatenated"
        )


def _check(
    value: Tensor, levels: _Levels | None, device_shapes: Tensor | None, locations: Tensor, weights: Tensor
) -> None:
    check_rank("value", value, "N S M D")
    check_rank("sampling_locations", locations, "N Q M L P 2")
    check_rank("attention_weights", weights, "N Q M L P")
    check_together("value", {"value": value, "sampling_locations": locations, "attention_weights": weights})
    for name, tensor in (("sampling_locations", locations), ("attention_weights", weights)):
        check_size(name, tensor, 0, value.shape[0], "the batch of value")
        check_size(name, tensor, 2, value.shape[2], "the heads of value")
    check_size("sampling_locations", locations, 5, 2, "x and y")
    for axis, what in ((1, "queries"), (3, "levels"), (4, "points")):
        check_size("attention_weights", weights, axis, locations.shape[axis], f"the {what} of sampling_locations")
    if levels is not None:
        check_size("sampling_locations", locations, 3, len(levels), "the levels of spatial_shapes")
        positions = sum(height * width for height, width in levels)
        check_size("value", value, 1, positions, f"the sum of H*W over spatial_shapes {levels}")
    elif device_shapes is not None:
        check_size("sampling_locations", locations, 3, device_shapes.shape[0], "the levels of spatial_shapes")


def _run_python(path: str, value: Tensor, levels: _Levels, locations: Tensor, weights: Tensor) -> Tensor:
    """Run the portable or the reference path in its working precision."""
    if path == "reference":
        work, function = torch.float64, ms_deform_attn_reference
    else:
        work = _work_dtype(value)
        function = ms_deform_attn_portable
    output = function(value.to(work), levels, locations.to(work), weights.to(work))
    return output.to(value.dtype)


def _resolve(
    value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, device_shapes: Tensor | None
) -> _Levels:
    """Levels as pairs; reads a tensor of shapes, which synchronises if it is not on the CPU."""
    if device_shapes is not None:
        levels = to_levels(device_shapes)
    else:
        levels = to_levels(list(zip(sizes[::2], sizes[1::2], strict=True)))
    _check(value, levels, None, locations, weights)
    return levels


def _work_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


# One list of arguments for the operator, its gradient and the fake kernels of both.
_ARGUMENTS = (
    "Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights, "
    "Tensor? device_shapes=None"
)


@operator("ms_deform_attn", f"({_ARGUMENTS}) -> Tensor", differentiable=True)
def _operator(
    value: Tensor, sizes: _Sizes, locations: Tensor, weights: Tensor, device_shapes: Tensor | None = None
) -> Tensor:
    path = choose(value.device).path
    if path != "compiled":
        levels = _resolve(value, sizes, locations, weights, device_shapes)
        return _run_python(path, value, levels, locations, weights).contiguous()
    arguments = _kernel_arguments(value, sizes, locations, weights, device_shapes)
    return torch.ops.the_mask_kernels.ms_deform_attn_forward(*arguments)


def _kernel_arguments(
    value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, device_shapes: Tensor | None
) -> tuple[Any, ...]:
    """Contiguous tensors in the dtypes of the kernels: coordinates and weights in the working precision."""
    if device_shapes is None or device_shapes.device.type == "cpu":
        levels = _resolve(value, sizes, locations, weights, device_shapes)
        sizes, device_shapes = [size for pair in levels for size in pair], None
    else:
        _check(value, None, device_shapes, locations, weights)
        device_shapes = device_shapes.to(device=value.device, dtype=torch.int64).contiguous()
    work = _work_dtype(value)
    return (
        value.contiguous(),
        list(sizes),
        device_shapes,
        locations.to(work).contiguous(),
        weights.to(work).contiguous(),
    )


@torch.library.register_fake("the_mask::ms_deform_attn")
def _(value: Tensor, sizes: _Sizes, locations: Tensor, weights: Tensor, device_shapes: Tensor | None = None) -> Tensor:
    levels = to_levels(list(zip(sizes[::2], sizes[1::2]))) if device_shapes is None else None
    _check(value, levels, device_shapes, locations, weights)
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@operator("ms_deform_attn_backward", f"(Tensor grad_output, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
def _backward_operator(
    grad: Tensor, value: Tensor, sizes: _Sizes, locations: Tensor, weights: Tensor, device_shapes: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, sampling_locations and attention_weights, each in its argument's dtype."""
    inputs = (value, locations, weights)
    path = choose(value.device).path
    if path == "compiled":
        arguments = _kernel_arguments(value, sizes, locations, weights, device_shapes)
        deterministic = torch.are_deterministic_algorithms_enabled()
        grads = torch.ops.the_mask_kernels.ms_deform_attn_backward(
            grad.to(value.dtype).contiguous(), *arguments, deterministic
        )
    else:
        levels = _resolve(value, sizes, locations, weights, device_shapes)
        work = torch.float64 if path == "reference" else _work_dtype(value)
        grads = ms_deform_attn_python_backward(
            grad.to(work), value.to(work), levels, locations.to(work), weights.to(work)
        )
    grad_value, grad_locations, grad_weights = (
        found.to(tensor.dtype).contiguous() for found, tensor in zip(grads, inputs)
    )
    return grad_value, grad_locations, grad_weights


@torch.library.register_fake("the_mask::ms_deform_attn_backward")
def _(
    grad: Tensor, value: Tensor, sizes: _Sizes, locations: Tensor, weights: Tensor, device_shapes: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, locations, weights, device_shapes = inputs
    ctx.save_for_backward(value, locations, weights, device_shapes)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights, device_shapes = ctx.saved_tensors
    grads = torch.ops.the_mask.ms_deform_attn_backward(
        grad_output, value, ctx.spatial_shapes, locations, weights, device_shapes
    )
    return grads[0], None, grads[1], grads[2], None


torch.library.register_autograd("the_mask::ms_deform_attn", _backward, setup_context=_setup_context)
