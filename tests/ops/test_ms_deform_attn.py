"""Multi-scale deformable attention: every path against the float64 oracle, the oracle against scalar loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import (
    ALL_PATHS,
    DTYPES,
    MAIN_PATHS,
    MSDA_CASES,
    MsdaCase,
    Path,
    assert_equal_over_threads,
    deterministic,
)
from tolerances import assert_close, assert_operator
from torch import Tensor

from the_mask.ops import ms_deform_attn
from the_mask.ops.msda.reference import ms_deform_attn_reference

NAMES = ("value", "sampling_locations", "attention_weights")


def oracle(case: MsdaCase, arguments: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients in float64 on the arguments as they are rounded."""
    exact = [argument.detach().cpu().double().requires_grad_() for argument in arguments]
    output = ms_deform_attn_reference(exact[0], case.levels, exact[1], exact[2])
    return output.detach(), torch.autograd.grad(output, exact, grad.cpu().double())


def compare(case: MsdaCase, path: Path, arguments: tuple[Tensor, ...], skip_location_gradient: bool = False) -> None:
    """Run one path forward and backward and compare all results."""
    value, locations, weights = arguments
    output = ms_deform_attn(value, case.levels, None, locations, weights)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device, output.dtype)
    expected, expected_grads = oracle(case, arguments, grad)
    assert output.dtype == value.dtype
    assert_operator(output, expected, "output", f"output on {path}")
    grads = torch.autograd.grad(output, arguments, grad)
    for name, argument, found, wanted in zip(NAMES, arguments, grads, expected_grads):
        assert found.dtype == argument.dtype
        if not (skip_location_gradient and name == "sampling_locations"):
            assert_operator(found, wanted, "gradient", f"gradient of {name} on {path}")


def scalar_loops(value: Tensor, levels: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor) -> Tensor:
    """The definition, one number at a time."""
    batch, _, heads, channels = value.shape
    output = torch.zeros(batch, locations.shape[1], heads, channels, dtype=torch.float64)
    for n, q, m in torch.cartesian_prod(*(torch.arange(size) for size in output.shape[:3])).tolist():
        start = 0
        for level, (height, width) in enumerate(levels):
            for p in range(locations.shape[4]):
                x = float(locations[n, q, m, level, p, 0]) * width - 0.5
                y = float(locations[n, q, m, level, p, 1]) * height - 0.5
                if not (-1 < x < width and -1 < y < height):
                    continue
                left, top = math.floor(x), math.floor(y)
                for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
                    if 0 <= column < width and 0 <= row < height:
                        share = (1 - abs(x - column)) * (1 - abs(y - row)) * float(weights[n, q, m, level, p])
                        output[n, q, m] += share * value[n, start + row * width + column, m]
            start += height * width
    return output.flatten(2)


def test_oracle_equals_scalar_loops():
    case = MsdaCase(2, 2, 3, 4, 2, ((3, 5), (2, 2)))
    value, locations, weights = (argument.detach() for argument in case.arguments(torch.float64))
    found = ms_deform_attn_reference(value, case.levels, locations, weights)
    assert_close(found, scalar_loops(value, case.levels, locations, weights), "formula")


def test_oracle_equals_transformers():
    peer = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    case = MSDA_CASES[1]
    value, locations, weights = (argument.detach() for argument in case.arguments(torch.float64))
    expected = peer.multi_scale_deformable_attention(value, list(case.levels), locations, weights)
    found = ms_deform_attn_reference(value, case.levels, locations, weights)
    assert_close(found, expected, "sum")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MSDA_CASES, ids=str)
@pytest.mark.parametrize("path", ALL_PATHS)
def test_path_equals_oracle(path: Path, case: MsdaCase, dtype: torch.dtype):
    with path.running():
        compare(case, path, case.arguments(dtype, path.device))


@pytest.mark.parametrize("path", MAIN_PATHS)
def test_mixed_dtypes(path: Path):
    """float32 values with bfloat16 parameters and the other way round: gradients come in each argument's dtype."""
    case = MSDA_CASES[1]
    with path.running():
        value, locations, weights = case.arguments(torch.float32, path.device)
        low = (locations.detach().bfloat16().requires_grad_(), weights.detach().half().requires_grad_())
        # Rounded locations may be integer positions.
        compare(case, path, (value, *low), skip_location_gradient=not path.exact_at_integers)
        half = value.detach().bfloat16().requires_grad_()
        compare(case, path, (half, *low), skip_location_gradient=not path.exact_at_integers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", ALL_PATHS)
def test_integer_positions(path: Path, dtype: torch.dtype):
    """At integer positions the value is the pixel and the derivative the right-sided one. Sizes are powers of two, so
    that positions are exact in float32."""
    case = MsdaCase(1, 2, 16, 12, 4, ((4, 8), (2, 2)))
    with path.running():
        value, locations, weights = case.arguments(dtype, path.device)
        with torch.no_grad():
            extent = locations.new_tensor([[width, height] for height, width in case.levels])[:, None]
            locations.copy_(((locations * extent - 0.5).round() + 0.5) / extent)
        compare(case, path, (value, locations, weights), skip_location_gradient=not path.exact_at_integers)


@pytest.mark.parametrize("path", ALL_PATHS)
def test_border_and_non_finite_positions(path: Path):
    """p = -1 and p = size take no part, nor do NaN, infinite and huge positions: zero value, zero gradients."""
    levels = ((4, 8),)
    with path.running():
        value = torch.randn(1, 32, 1, 16, device=path.device, requires_grad=True)
        for axis, size in ((0, 8), (1, 4)):
            outside = [-0.5 / size, (size + 0.5) / size]  # exactly -1 and size in pixels
            outside += [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e9]
            locations = torch.full((1, len(outside), 1, 1, 1, 2), 0.4, device=path.device)
            locations[0, :, 0, 0, 0, axis] = torch.tensor(outside, device=path.device)
            locations.requires_grad_()
            weights = torch.ones(1, len(outside), 1, 1, 1, device=path.device, requires_grad=True)
            output = ms_deform_attn(value, levels, None, locations, weights)
            assert float(output.detach().abs().max()) == 0
            for grad in torch.autograd.grad(output.sum(), (value, locations, weights)):
                assert float(grad.abs().max()) == 0


@pytest.mark.parametrize("path", MAIN_PATHS)
@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0)])
def test_empty(path: Path, batch: int, queries: int):
    case = MsdaCase(batch, 2, 8, queries, 3, ((3, 4), (2, 2)))
    with path.running():
        arguments = case.arguments(torch.float32, path.device)
        output = ms_deform_attn(arguments[0], case.levels, None, *arguments[1:])
        assert output.shape == (batch, queries, 16)
        grads = torch.autograd.grad(output.sum(), arguments)
        assert [grad.shape for grad in grads] == [argument.shape for argument in arguments]
        assert all(float(grad.abs().sum()) == 0 for grad in grads)


@pytest.mark.parametrize("path", MAIN_PATHS)
def test_non_contiguous(path: Path):
    case = MSDA_CASES[1]
    with path.running():
        value, locations, weights = case.arguments(torch.float32, path.device)
        strided = (
            value.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).requires_grad_(),
            locations.detach().flip(1).flip(1).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
            weights.detach()[..., None].expand(*weights.shape, 2)[..., 0].requires_grad_(),
        )
        assert not strided[0].is_contiguous()
        compare(case, path, strided)
        # An expanded gradient, as sum() hands back.
        output = ms_deform_attn(strided[0], case.levels, None, *strided[1:])
        grad = torch.autograd.grad(output.sum(), strided[0])[0]
        plain = ms_deform_attn(value, case.levels, None, locations, weights)
        expected = torch.autograd.grad(plain, value, torch.ones_like(plain))[0]
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("path", ALL_PATHS)
def test_gradcheck(path: Path):
    case = MsdaCase(1, 2, 5, 6, 2, ((3, 4), (2, 2)))
    with path.running():
        arguments = case.arguments(torch.float64, path.device)
        assert torch.autograd.gradcheck(
            lambda value, locations, weights: ms_deform_attn(value, case.levels, None, locations, weights),
            arguments,
            eps=1e-7,
            atol=1e-6,
            fast_mode=path.code != "AVX-512",
        )


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 4),
    channels=st.integers(1, 40),
    queries=st.integers(1, 30),
    points=st.integers(1, 6),
    levels=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_random_shapes(batch, heads, channels, queries, points, levels, dtype, seed):
    case = MsdaCase(batch, heads, channels, queries, points, tuple(levels))
    path = Path("compiled")
    with path.running():
        compare(case, path, case.arguments(dtype, seed=seed))


@pytest.mark.parametrize("queries", [3, 200])
def test_threads_change_nothing(queries: int):
    """Bit for bit the same with one, two and five threads, forward and backward; more threads than heads, too."""
    case = MsdaCase(1, 3, 32, queries, 4, ((12, 20), (6, 10)))

    def compute() -> list[Tensor]:
        arguments = case.arguments(torch.float32)
        output = ms_deform_attn(arguments[0], case.levels, None, *arguments[1:])
        return [output, *torch.autograd.grad(output.square().sum(), arguments)]

    assert_equal_over_threads((1, 2, 5, 12), compute)


@pytest.mark.parametrize("path", MAIN_PATHS)
def test_deterministic_mode(path: Path):
    case = MSDA_CASES[1]
    with path.running(), deterministic():
        compare(case, path, case.arguments(torch.float32, path.device))


@pytest.mark.slow
def test_more_than_two_to_the_31_numbers():
    """Images lie at 64-bit addresses. Memory that nobody writes costs nothing, so this takes little."""
    with Path("compiled").running():
        height, width = 5000, 5625
        value = torch.zeros(3, height * width, 1, 32, dtype=torch.bfloat16)
        value[2, -1] = 3
        levels = [(height, width)]
        locations = torch.tensor([(width - 0.5) / width, (height - 0.5) / height])
        locations = locations.expand(3, 1, 1, 1, 1, 2)
        output = ms_deform_attn(value, levels, None, locations, torch.ones(3, 1, 1, 1, 1))
        assert float(output[0].abs().max()) == 0
        assert abs(float(output[2].min()) - 3) < 0.1


def test_one_image_too_large_is_an_error():
    with Path("compiled").running():
        value = torch.empty(1, 2**26, 1, 32, dtype=torch.bfloat16)  # never touched, so it takes no memory
        with pytest.raises(RuntimeError, match="less than 2\\^31"):
            ms_deform_attn(value, [(1, 2**26)], None, torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1))
