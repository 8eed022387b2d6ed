"""The operator ``the_mask::dcnv3``: checks, schema, fake kernel, gradients, and the choice of a path.

Axes: ``N`` batch, ``H W`` input size, ``Ho Wo`` output size, ``C`` channels, ``G`` groups, ``P`` points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from the_mask.ops.checks import check_rank, check_size, check_together
from the_mask.ops.dcn.geometry import Geometry, make_geometry
from the_mask.ops.dcn.reference import dcnv3_portable, dcnv3_python_backward, dcnv3_reference
from the_mask.ops.registration import operator
from the_mask.ops.selection import choose


def dcnv3(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    offset_scale: float = 1.0,
    *,
    remove_center: bool = False,
    center_feature_scale: Tensor | None = None,
) -> Tensor:
    """Deformable convolution v3 (InternImage, eq. 2): per group, a weighted sum of P bilinear samples.

    Arithmetic and coordinates are float32 (float64 for float64 input), whatever the storage types. All tensors get
    gradients. See :mod:`the_mask.ops.sampling` for the boundary. Pairs are (vertical, horizontal).

    Args:
        x: [N, H, W, C], channels last; group g owns channels g*C/G to (g+1)*C/G.
        offset: [N, Ho, Wo, G*P*2] in pixels before ``offset_scale``; last axis (group, point, (x, y)), points column
            by column.
        mask: [N, Ho, Wo, G*P], after a softmax over the P points by the caller.
        kernel_size, stride, padding, dilation: as for a convolution.
        groups: G.
        offset_scale: scales the whole kernel grid about its centre, not only the learned part.
        remove_center: leave the centre tap out (square odd kernels): P is one less.
        center_feature_scale: [N, H, W, G] or None; mixes in a share a of ``x``, ``y*(1-a) + x*a``. The output must have
            the size of the input.

    Returns:
        [N, Ho, Wo, C] in the dtype of ``x``.

    Raises:
        ValueError: shapes, sizes, dtypes or devices that do not fit; the message names them.
    """
    geometry = make_geometry(kernel_size, stride, padding, dilation, groups, offset_scale, remove_center)
    _check(x, offset, mask, geometry, center_feature_scale)
    path = choose(x.device).path
    if path == "compiled":
        return torch.ops.the_mask.dcnv3(x, offset, mask, center_feature_scale, *geometry)
    return _run_python(path, x, offset, mask, geometry, center_feature_scale)


def _check(x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, scale: Tensor | None) -> None:
    check_rank("x", x, "N H W C")
    check_rank("offset", offset, "N Ho Wo G*P*2")
    check_rank("mask", mask, "N Ho Wo G*P")
    check_together("x", {"x": x, "offset": offset, "mask": mask, "center_feature_scale": scale})
    batch, height, width, channels = x.shape
    if height < 1 or width < 1 or channels < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: H, W and C must be positive")
    if channels % geometry.groups:
        raise ValueError(f"x has {channels} channels, which groups={geometry.groups} does not divide")
    rows, columns = geometry.output_size(height, width)
    if rows < 1 or columns < 1:
        raise ValueError(
            f"kernel_size={geometry.kernel} with dilation={geometry.dilation} and padding={geometry.padding} does not "
            f"fit into x of shape {tuple(x.shape)}: the output would be {rows}x{columns}"
        )
    per_position = geometry.groups * geometry.points
    for name, tensor, last in (("offset", offset, 2 * per_position), ("mask", mask, per_position)):
        check_size(name, tensor, 0, batch, "the batch of x")
        check_size(name, tensor, 1, rows, "output rows")
        check_size(name, tensor, 2, columns, "output columns")
        check_size(name, tensor, 3, last, f"groups={geometry.groups}, points per group={geometry.points}")
    if scale is not None:
        check_rank("center_feature_scale", scale, "N H W G")
        for axis, expected in enumerate((batch, height, width, geometry.groups)):
            check_size("center_feature_scale", scale, axis, expected, "[N, H, W, G]")
        if (rows, columns) != (height, width):
            raise ValueError(
                f"center_feature_scale needs an output of the input's size {height}x{width}, not {rows}x{columns}"
            )


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _run_python(path: str, x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, scale: Tensor | None) -> Tensor:
    """Run the portable or the reference path in its working precision."""
    if path == "reference":
        work, function = torch.float64, dcnv3_reference
    else:
        work = _work_dtype(x)
        function = dcnv3_portable
    scale = None if scale is None else scale.to(work)
    return function(x.to(work), offset.to(work), mask.to(work), geometry, scale).to(x.dtype)


def _kernel_arguments(
    x: Tensor, offset: Tensor, mask: Tensor, scale: Tensor | None, geometry: Geometry
) -> tuple[Any, ...]:
    """Contiguous tensors in the dtypes of the kernels: offsets and weights in the working precision."""
    work = _work_dtype(x)
    scale = None if scale is None else scale.to(work).contiguous()
    return (x.contiguous(), offset.to(work).contiguous(), mask.to(work).contiguous(), scale, *geometry)


# The argument list of the operator, its gradient, and the fake kernels of both.
_ARGUMENTS = (
    "Tensor x, Tensor offset, Tensor mask, Tensor? center_feature_scale, SymInt[] kernel_size, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, SymInt groups, float offset_scale, bool remove_center"
)


@operator("dcnv3", f"({_ARGUMENTS}) -> Tensor", differentiable=True)
def _operator(x: Tensor, offset: Tensor, mask: Tensor, scale: Tensor | None, *arguments: Any) -> Tensor:
    geometry = make_geometry(*arguments)
    _check(x, offset, mask, geometry, scale)
    path = choose(x.device).path
    if path != "compiled":
        return _run_python(path, x, offset, mask, geometry, scale).contiguous()
    return torch.ops.the_mask_kernels.dcnv3_forward(*_kernel_arguments(x, offset, mask, scale, geometry))


@torch.library.register_fake("the_mask::dcnv3")
def _(x: Tensor, offset: Tensor, mask: Tensor, scale: Tensor | None, *arguments: Any) -> Tensor:
    geometry = make_geometry(*arguments)
    _check(x, offset, mask, geometry, scale)
    return x.new_empty(x.shape[0], *geometry.output_size(x.shape[1], x.shape[2]), x.shape[3])


@operator("dcnv3_backward", f"(Tensor grad_output, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
def _backward_operator(
    grad_output: Tensor, x: Tensor, offset: Tensor, mask: Tensor, scale: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, offset, mask and center_feature_scale (empty without one), each in its argument's dtype."""
    geometry = make_geometry(*arguments)
    _check(x, offset, mask, geometry, scale)
    inputs = [x, offset, mask] + ([] if scale is None else [scale])
    path = choose(x.device).path
    if path == "compiled":
        deterministic = torch.are_deterministic_algorithms_enabled()
        found = torch.ops.the_mask_kernels.dcnv3_backward(
            grad_output.to(x.dtype).contiguous(), *_kernel_arguments(x, offset, mask, scale, geometry), deterministic
        )
    else:
        work = torch.float64 if path == "reference" else _work_dtype(x)
        converted = [tensor.to(work) for tensor in inputs]
        share = converted[3] if len(converted) == 4 else None
        found = dcnv3_python_backward(grad_output.to(work), converted[0], converted[1], converted[2], geometry, share)
    grads = [grad.to(tensor.dtype).contiguous() for grad, tensor in zip(found, inputs)]
    return grads[0], grads[1], grads[2], grads[3] if len(grads) == 4 else x.new_empty(0)


@torch.library.register_fake("the_mask::dcnv3_backward")
def _(
    grad_output: Tensor, x: Tensor, offset: Tensor, mask: Tensor, scale: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_scale = x.new_empty(0) if scale is None else scale.new_empty(scale.shape)
    return x.new_empty(x.shape), offset.new_empty(offset.shape), mask.new_empty(mask.shape), grad_scale


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offset, mask, scale, *ctx.geometry = inputs
    ctx.save_for_backward(x, offset, mask, scale)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, offset, mask, scale = ctx.saved_tensors
    grads = torch.ops.the_mask.dcnv3_backward(grad_output, x, offset, mask, scale, *ctx.geometry)
    grad_scale = None if scale is None else grads[3]
    return grads[0], grads[1], grads[2], grad_scale, *([None] * len(ctx.geometry))


torch.library.register_autograd("the_mask::dcnv3", _backward, setup_context=_setup_context)
