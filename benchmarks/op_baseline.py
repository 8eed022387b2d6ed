"""The scalar CUDA kernels of ``cuda_baseline/``: built on first use, then a contender of bench_ops.py on a GPU.

python benchmarks/op_baseline.py        # compile, link and load only; needs nvcc, no GPU
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
sys.path.insert(0, str(CSRC))
from cuda_check import CUDA_FLAGS, find_toolkit, why_not  # noqa: E402


@functools.cache
def load_baseline() -> Any:
    """The namespace of the baseline's operators.

    Raises:
        RuntimeError: no usable nvcc, or it does not compile.
    """
    toolkit = find_toolkit()
    problem = why_not(toolkit)
    if problem is not None:
        raise RuntimeError(f"the scalar CUDA baseline cannot be built: {problem}")
    os.environ["CUDA_HOME"] = str(toolkit)
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    from torch.utils.cpp_extension import load

    sources = [HERE / "cuda_baseline" / "scalar.cu", HERE / "cuda_baseline" / "bindings.cpp"]
    with tempfile.TemporaryDirectory(prefix="cuda_baseline_") as folder:
        load(
            name="the_mask_cuda_baseline",
            sources=[str(path) for path in [*sources, CSRC / "cuda" / "operators.cpp"]],
            extra_include_paths=[str(CSRC), str(CSRC / "cuda")],
            extra_cflags=["-O2", "-DTHE_MASK_WITH_CUDA", "-fvisibility=hidden"],
            extra_cuda_cflags=[*CUDA_FLAGS, "-DTHE_MASK_WITH_CUDA", "-Xcompiler", "-fvisibility=hidden"],
            extra_ldflags=["-Wl,--no-undefined"],
            build_directory=folder,
            is_python_module=False,
        )
    return torch.ops.the_mask_baseline


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, sizes: list[int], places: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(value, places, weights)
        ctx.sizes = sizes
        return load_baseline().ms_deform_attn_forward(value, sizes, None, places, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, places, weights = ctx.saved_tensors
        found = load_baseline().ms_deform_attn_backward(
            grad.contiguous(), value, ctx.sizes, None, places, weights, False
        )
        return found[0].to(value.dtype), None, found[1], found[2]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, mask: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(x, offset, mask)
        ctx.rest = (None, [3, 3], [1, 1], [1, 1], [1, 1], groups, 1.0, False)
        return load_baseline().dcnv3_forward(x, offset, mask, *ctx.rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, offset, mask = ctx.saved_tensors
        found = load_baseline().dcnv3_backward(grad.contiguous(), x, offset, mask, *ctx.rest, False)
        return found[0].to(x.dtype), found[1], found[2], None


def scalar_ms_deform_attn(value: Tensor, levels: Sequence[tuple[int, int]], places: Tensor, weights: Tensor) -> Tensor:
    """Multi-scale deformable attention on the baseline; contiguous CUDA tensors, float32 places and weights."""
    sizes = [size for level in levels for size in level]
    return _Attention.apply(value, sizes, places, weights)


def scalar_dcnv3(x: Tensor, offset: Tensor, mask: Tensor, groups: int) -> Tensor:
    """DCNv3, 3x3 with padding 1, on the baseline; contiguous CUDA tensors, float32 offset and mask."""
    return _Convolution.apply(x, offset, mask, groups)


if __name__ == "__main__":
    load_baseline()
    print("compiled, linked and loaded; nothing was run")
