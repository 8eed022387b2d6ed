"""The compiled CUDA path of the operators against the float64 oracle, on a GPU.

``benchmarks/gpu_check.py`` runs this file without pytest: parameters are all it may use. THE_MASK_TEST_DEVICE=cpu runs
it on the CPU kernels, to try the file itself.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from tolerances import assert_kernel
from torch import Tensor

from the_mask.ops import dcnv3, ms_deform_attn, upsample_argmax, use
from the_mask.ops.extension import missing_for

DEVICE = os.environ.get("THE_MASK_TEST_DEVICE", "cuda")


def _why_skipped() -> str | None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA device"
    return missing_for(DEVICE)


pytestmark = [pytest.mark.cuda, pytest.mark.skipif(_why_skipped() is not None, reason=str(_why_skipped()))]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class MsdaCase(NamedTuple):
    levels: tuple[tuple[int, int], ...] = ((5, 7), (3, 4), (1, 1))
    batch: int = 2
    queries: int = 33
    heads: int = 3
    channels: int = 32
    points: int = 4


MSDA_CASES = {
    "wide": MsdaCase(),
    "one-channel": MsdaCase(channels=1, points=1),
    "four-channels": MsdaCase(channels=4, batch=1, queries=301),
    "odd-channels": MsdaCase(channels=30, levels=((3, 3), (4, 2), (1, 6), (2, 1), (1, 1))),
    "seventy-one-channels": MsdaCase(channels=71, queries=7),
    "many-channels": MsdaCase(channels=264, queries=7, points=8),
    "encoder": MsdaCase(levels=((15, 27), (30, 54), (60, 107)), queries=8445, heads=8, batch=1),
    "empty-batch": MsdaCase(batch=0),
    "no-queries": MsdaCase(queries=0),
}


def msda_inputs(case: MsdaCase, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """value, locations, weights on the CPU (values of ``dtype``), and a gradient of the output."""
    generator = torch.Generator().manual_seed(7)
    positions, levels = sum(h * w for h, w in case.levels), len(case.levels)
    items = (case.batch, case.queries, case.heads, levels, case.points)
    value = torch.randn(case.batch, positions, case.heads, case.channels, generator=generator)
    locations = torch.rand(*items, 2, generator=generator) * 2 - 0.5
    # At integers the derivative jumps; float32 rounding must not carry a point across one.
    scale = torch.tensor(case.levels, dtype=torch.float32).flip(-1)[:, None]
    pixels = locations * scale - 0.5
    locations = torch.where((pixels - pixels.round()).abs() < 1e-3, locations + 4e-3 / scale, locations)
    weights = torch.randn(*items, generator=generator)
    grad = torch.randn(case.batch, case.queries, case.heads * case.channels, generator=generator)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return value.to(dtype), locations.to(work), weights.to(work), grad.to(dtype)


def leaf(tensor: Tensor, device: str = DEVICE, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.to(device=device, dtype=dtype).detach().clone().requires_grad_()


def compare_msda(case: MsdaCase, dtype: torch.dtype, shapes: Tensor | list[tuple[int, int]]) -> None:
    value, locations, weights, grad = msda_inputs(case, dtype)
    on_gpu = [leaf(value), leaf(locations), leaf(weights)]
    with use("compiled"):
        output = ms_deform_attn(on_gpu[0], shapes, None, on_gpu[1], on_gpu[2])
        output.backward(grad.to(DEVICE))
    on_cpu = [leaf(tensor, "cpu", torch.float64) for tensor in (value, locations, weights)]
    with use("reference"):
        expected = ms_deform_attn(on_cpu[0], list(case.levels), None, on_cpu[1], on_cpu[2])
        expected.backward(grad.double())
    assert output.dtype == dtype
    assert_kernel(output, expected.detach(), "output", "output")
    for name, found, wanted in zip(("value", "locations", "weights"), on_gpu, on_cpu, strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        assert found.grad.dtype == found.dtype
        assert_kernel(found.grad, wanted.grad, "gradient", f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MSDA_CASES)
def test_ms_deform_attn(name: str, dtype: torch.dtype) -> None:
    compare_msda(MSDA_CASES[name], dtype, list(MSDA_CASES[name].levels))


@pytest.mark.parametrize("name", ["wide", "odd-channels"])
def test_ms_deform_attn_reads_sizes_on_the_device(name: str) -> None:
    compare_msda(MSDA_CASES[name], torch.float32, torch.tensor(MSDA_CASES[name].levels, device=DEVICE))


def test_ms_deform_attn_with_mixed_dtypes_and_strides() -> None:
    value, locations, weights, _ = msda_inputs(MSDA_CASES["wide"], torch.bfloat16)
    levels = list(MSDA_CASES["wide"].levels)
    spread = value.to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2)
    shifted = torch.cat((torch.zeros(1), locations.flatten())).to(DEVICE)[1:].view(locations.shape)
    with use("compiled"):
        output = ms_deform_attn(spread, levels, None, shifted, weights.to(DEVICE).half())
    with use("reference"):
        expected = ms_deform_attn(value.double(), levels, None, locations.double(), weights.half().double())
    assert_kernel(output, expected, "output", "output")


class DcnCase(NamedTuple):
    size: tuple[int, int] = (17, 30)
    batch: int = 2
    groups: int = 4
    channels: int = 16
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    scale: float = 1.0
    remove_center: bool = False
    share: bool = False
    spread: float = 3.0


DCN_CASES = {
    "plain": DcnCase(),
    "share": DcnCase(share=True, channels=32, groups=10),
    "share-odd": DcnCase(share=True, channels=30, groups=1, scale=2.0),
    "rectangle": DcnCase(kernel=(2, 3), padding=(1, 0), channels=4),
    "stride": DcnCase(stride=(2, 1), padding=(2, 1), dilation=(1, 3), scale=0.5, channels=1),
    "no-center": DcnCase(kernel=(5, 5), padding=(2, 2), remove_center=True, channels=64, groups=1),
    "one-pixel": DcnCase(size=(1, 1), batch=3, groups=5, channels=71),
    "far": DcnCase(spread=10.0, channels=264, groups=1),
    "on-integers": DcnCase(spread=0.0),
    "empty-batch": DcnCase(batch=0),
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DCN_CASES)
def test_dcnv3(name: str, dtype: torch.dtype, deterministic: bool) -> None:
    case = DCN_CASES[name]
    sizes = [
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            case.size, case.padding, case.dilation, case.kernel, case.stride, strict=True
        )
    ]
    points = case.kernel[0] * case.kernel[1] - int(case.remove_center)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(9)
    tensors = [
        torch.randn(case.batch, *case.size, case.groups * case.channels, generator=generator).to(dtype),
        (torch.randn(case.batch, *sizes, case.groups * points * 2, generator=generator) * case.spread).to(work),
        torch.randn(case.batch, *sizes, case.groups * points, generator=generator).to(work),
    ]
    if case.share:
        tensors.append(torch.rand(case.batch, *case.size, case.groups, generator=generator).to(work))
    grad = torch.randn(case.batch, *sizes, case.groups * case.channels, generator=generator).to(dtype)

    def apply(inputs: list[Tensor]) -> Tensor:
        return dcnv3(
            *inputs[:3],
            case.kernel,
            case.stride,
            case.padding,
            case.dilation,
            case.groups,
            case.scale,
            remove_center=case.remove_center,
            center_feature_scale=inputs[3] if case.share else None,
        )

    on_gpu = [leaf(tensor) for tensor in tensors]
    on_cpu = [leaf(tensor, "cpu", torch.float64) for tensor in tensors]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with use("compiled"):
            output = apply(on_gpu)
            output.backward(grad.to(DEVICE))
    finally:
        torch.use_deterministic_algorithms(before)
    with use("reference"):
        expected = apply(on_cpu)
        expected.backward(grad.double())
    assert_kernel(output, expected.detach(), "output", "output")
    for which, found, wanted in zip(("x", "offset", "mask", "scale"), on_gpu, on_cpu):
        assert found.grad is not None
        assert wanted.grad is not None
        assert_kernel(found.grad, wanted.grad, "gradient", f"gradient of {which}")


def test_deterministic_gradients_are_equal_bit_by_bit() -> None:
    """All queries scatter into few pixels: with atomics the order, and with it the rounding, would vary."""
    case = MsdaCase(levels=((2, 2),), queries=4000, heads=2)
    value, locations, weights, grad = msda_inputs(case, torch.float32)
    found = []
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            inputs = [leaf(value), leaf(locations), leaf(weights)]
            with use("compiled"):
                ms_deform_attn(inputs[0], list(case.levels), None, inputs[1], inputs[2]).backward(grad.to(DEVICE))
            found.append(inputs[0].grad)
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_locations_that_are_not_numbers_or_far_outside_contribute_nothing() -> None:
    case = MSDA_CASES["wide"]
    value, locations, weights, grad = msda_inputs(case, torch.float32)
    wild = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e9])
    some = locations.view(-1)[::7]
    some.copy_(wild.repeat(some.numel() // 6 + 1)[: some.numel()])
    inputs = [leaf(value), leaf(locations), leaf(weights)]
    with use("compiled"):
        output = ms_deform_attn(inputs[0], list(case.levels), None, inputs[1], inputs[2])
        output.backward(grad.to(DEVICE))
    tame = torch.where(locations.abs() < 1e6, locations, torch.full((), -9.0))
    with use("reference"):
        expected = ms_deform_attn(value.double(), list(case.levels), None, tame.double(), weights.double())
    assert_kernel(output, expected, "output", "output")
    for tensor in inputs:
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


def test_runs_on_the_current_stream() -> None:
    if DEVICE != "cuda":
        pytest.skip("streams are CUDA's")
    case = MSDA_CASES["encoder"]
    value, locations, weights, _ = (tensor.to(DEVICE) for tensor in msda_inputs(case, torch.float32))
    with use("compiled"):
        expected = ms_deform_attn(value, list(case.levels), None, locations, weights)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            late = torch.zeros_like(value)
            torch.cuda._sleep(50_000_000)
            late.copy_(value)
            output = ms_deform_attn(late, list(case.levels), None, locations, weights)
        stream.synchronize()
    assert torch.equal(output, expected)


def test_can_be_captured_in_a_graph() -> None:
    if DEVICE != "cuda":
        pytest.skip("graphs are CUDA's")
    case = MSDA_CASES["wide"]
    value, locations, weights, _ = (tensor.to(DEVICE) for tensor in msda_inputs(case, torch.float32))
    shapes = torch.tensor(case.levels, device=DEVICE)
    with use("compiled"):
        expected = ms_deform_attn(value, shapes, None, locations, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = ms_deform_attn(value, shapes, None, locations, weights)
        output.zero_()
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, expected)


@pytest.mark.parametrize("classes", [1, 19, 124, 300])
@pytest.mark.parametrize("output", [(480, 853), (97, 131), (30, 50)])
def test_upsample_argmax(classes: int, output: tuple[int, int]) -> None:
    scores = torch.randn(classes, 30, 54, generator=torch.Generator().manual_seed(3))
    with use("compiled"):
        labels = upsample_argmax(scores.to(DEVICE), (120, 213), output, 4)
    with use("reference"):
        expected = upsample_argmax(scores, (120, 213), output, 4)
    assert labels.device.type == DEVICE
    assert labels.dtype == expected.dtype
    # Labels may differ where two classes are equal to float32.
    assert (labels.cpu() == expected).double().mean() > 0.9999
