"""DCNv3: every path against the float64 oracle, the oracle against scalar loops and against torchvision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import ALL_PATHS, DCN_CASES, DTYPES, MAIN_PATHS, DcnCase, Path, assert_equal_over_threads, deterministic
from tolerances import assert_close, assert_operator
from torch import Tensor
from torchvision.ops import deform_conv2d

from the_mask.ops import dcnv3
from the_mask.ops.dcn.geometry import Geometry, make_geometry
from the_mask.ops.dcn.reference import dcnv3_reference

NAMES = ("x", "offset", "mask", "center_feature_scale")


def run(case: DcnCase, arguments: list[Tensor]) -> Tensor:
    kernel, stride, padding, dilation, groups, offset_scale, remove_center = case.geometry
    return dcnv3(
        *arguments[:3],
        kernel,
        stride,
        padding,
        dilation,
        groups,
        offset_scale,
        remove_center=remove_center,
        center_feature_scale=arguments[3] if case.center else None,
    )


def compare(case: DcnCase, path: Path, arguments: list[Tensor], skip_offset_gradient: bool = False) -> None:
    """Run one path forward and backward and compare all results with the oracle on the rounded arguments."""
    output = run(case, arguments)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device, output.dtype)
    exact = [argument.detach().cpu().double().requires_grad_() for argument in arguments]
    expected = dcnv3_reference(*exact[:3], case.geometry, exact[3] if case.center else None)
    expected_grads = torch.autograd.grad(expected, exact, grad.cpu().double())
    assert output.dtype == arguments[0].dtype
    assert_operator(output, expected.detach(), "output", f"output on {path}")
    grads = torch.autograd.grad(output, arguments, grad)
    for name, argument, found, wanted in zip(NAMES, arguments, grads, expected_grads):
        assert found.dtype == argument.dtype
        if not (skip_offset_gradient and name == "offset"):
            assert_operator(found, wanted, "gradient", f"gradient of {name} on {path}")


def scalar_loops(x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry) -> Tensor:
    """The definition, one number at a time."""
    batch, height, width, channels = x.shape
    rows, columns = geometry.output_size(height, width)
    per_group = channels // geometry.groups
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = geometry.kernel, geometry.stride, geometry.padding, geometry.dilation
    ch, cw = dh * (kh - 1) // 2, dw * (kw - 1) // 2
    output = torch.zeros(batch, rows, columns, channels, dtype=torch.float64)
    offset = offset.view(batch, rows, columns, geometry.groups, -1, 2)
    mask = mask.view(batch, rows, columns, geometry.groups, -1)
    for n, oy, ox, g in torch.cartesian_prod(
        torch.arange(batch), torch.arange(rows), torch.arange(columns), torch.arange(geometry.groups)
    ).tolist():
        part = slice(g * per_group, (g + 1) * per_group)
        k = 0
        for i in range(kw):
            for j in range(kh):
                if geometry.remove_center and (i, j) == (kw // 2, kh // 2):
                    continue
                px = ox * sw - pw + cw + geometry.offset_scale * (i * dw - cw + float(offset[n, oy, ox, g, k, 0]))
                py = oy * sh - ph + ch + geometry.offset_scale * (j * dh - ch + float(offset[n, oy, ox, g, k, 1]))
                weight = float(mask[n, oy, ox, g, k])
                k += 1
                if not (-1 < px < width and -1 < py < height):
                    continue
                left, top = math.floor(px), math.floor(py)
                for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
                    if 0 <= column < width and 0 <= row < height:
                        share = (1 - abs(px - column)) * (1 - abs(py - row)) * weight
                        output[n, oy, ox, part] += share * x[n, row, column, part]
    return output


@pytest.mark.parametrize(
    "case",
    [
        DcnCase(2, 4, 5, 3, make_geometry((3, 2), (2, 1), (0, 1), (1, 2), 2, 0.5, False), reach=3),
        DcnCase(1, 4, 3, 2, make_geometry(3, 1, 1, 1, 2, 2.0, True), reach=3),
    ],
    ids=str,
)
def test_oracle_equals_scalar_loops(case: DcnCase):
    x, offset, mask = (argument.detach() for argument in case.arguments(torch.float64))
    found = dcnv3_reference(x, offset, mask, case.geometry)
    assert_close(found, scalar_loops(x, offset, mask, case.geometry), "formula")


def by_torchvision(x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry) -> Tensor:
    """DCNv3 as a depthwise deformable convolution with all-ones weight: points row by row, (y, x), unscaled taps."""
    batch, height, width, channels = x.shape
    rows, columns = geometry.output_size(height, width)
    kh, kw = geometry.kernel
    taps = torch.tensor(geometry.taps(), dtype=x.dtype)
    moved = offset.view(batch, rows, columns, geometry.groups, kw * kh, 2) * geometry.offset_scale
    moved = moved + (geometry.offset_scale - 1) * taps
    moved = moved.unflatten(4, (kw, kh)).transpose(4, 5).flatten(4, 5).flip(-1)
    mask = mask.view(batch, rows, columns, geometry.groups, kw, kh).transpose(4, 5).flatten(3)
    output = deform_conv2d(
        x.permute(0, 3, 1, 2),
        moved.flatten(3).permute(0, 3, 1, 2),
        torch.ones(channels, 1, kh, kw, dtype=x.dtype),
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        mask.permute(0, 3, 1, 2),
    )
    return output.permute(0, 2, 3, 1)


@pytest.mark.parametrize("case", [case for case in DCN_CASES if not case.geometry.remove_center], ids=str)
def test_oracle_equals_torchvision(case: DcnCase):
    """Values and gradients; torchvision scales by the dilation itself, so its taps are the unscaled ones."""
    arguments = case.arguments(torch.float64)[:3]
    expected = by_torchvision(*arguments, case.geometry)
    found = dcnv3_reference(*arguments, case.geometry)
    assert_close(found, expected, "layer")
    grad = torch.randn_like(found)
    for mine, theirs in zip(
        torch.autograd.grad(found, arguments, grad), torch.autograd.grad(expected, arguments, grad)
    ):
        assert_close(mine, theirs, "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DCN_CASES, ids=str)
@pytest.mark.parametrize("path", ALL_PATHS)
def test_path_equals_oracle(path: Path, case: DcnCase, dtype: torch.dtype):
    with path.running():
        compare(case, path, case.arguments(dtype, path.device))


@pytest.mark.parametrize("path", MAIN_PATHS)
def test_mixed_dtypes(path: Path):
    case = DCN_CASES[1]
    with path.running():
        x, offset, mask, share = case.arguments(torch.float32, path.device)
        low = [offset.detach().half().requires_grad_(), mask.detach().bfloat16().requires_grad_(), share]
        # Rounded offsets may give integer positions.
        compare(case, path, [x, *low], skip_offset_gradient=not path.exact_at_integers)
        half = x.detach().bfloat16().requires_grad_()
        compare(case, path, [half, *low], skip_offset_gradient=not path.exact_at_integers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("offset_scale", [1.0, 2.0])
@pytest.mark.parametrize("path", ALL_PATHS)
def test_zero_offsets(path: Path, offset_scale: float, dtype: torch.dtype):
    """As at initialisation: every sample on a pixel, the outermost at -1, which takes no part. Right-sided
    derivatives."""
    case = DcnCase(2, 5, 6, 16, make_geometry(3, 1, 1, 1, 2, offset_scale, False), center=True)
    with path.running():
        arguments = case.arguments(dtype, path.device)
        with torch.no_grad():
            arguments[1].zero_()
        compare(case, path, arguments, skip_offset_gradient=not path.exact_at_integers)


@pytest.mark.parametrize("path", ALL_PATHS)
def test_border_and_non_finite_offsets(path: Path):
    """Points at exactly -1 and size, and NaN, infinite and huge offsets: zero value, zero gradients."""
    geometry = make_geometry(1, 1, 0, 1, 1, 1.0, False)
    outside = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e9]
    with path.running():
        for axis in (0, 1):
            x = torch.randn(1, 1, 8, 16, device=path.device)
            x = (x if axis == 0 else x.transpose(1, 2).contiguous()).requires_grad_()
            # Output i lies at pixel i: move the first two to -1 and to 8.
            places = torch.tensor([-1.0, 7.0, *outside], device=path.device)
            offset = torch.zeros(1, *x.shape[1:3], 2, device=path.device)
            offset[..., axis] = places.view(x.shape[1:3])
            offset.requires_grad_()
            mask = torch.ones(1, *x.shape[1:3], 1, device=path.device, requires_grad=True)
            output = dcnv3(x, offset, mask, *geometry[:6])
            assert float(output.detach().abs().max()) == 0
            for grad in torch.autograd.grad(output.sum(), (x, offset, mask)):
                assert float(grad.abs().max()) == 0


@pytest.mark.parametrize("path", ALL_PATHS)
def test_non_finite_offset_leaves_others_alone(path: Path):
    case = DCN_CASES[1]
    with path.running():
        arguments = case.arguments(torch.float32, path.device)
        clean = run(case, arguments)
        with torch.no_grad():
            arguments[1][0, 2, 3, 5] = float("nan")
            arguments[1][0, 2, 3, 8] = 1e30
        output = run(case, arguments)
        changed = (output != clean).any(-1).nonzero().tolist()
        assert changed == [[0, 2, 3]]
        assert bool(torch.isfinite(output).all())


@pytest.mark.parametrize("path", MAIN_PATHS)
def test_empty_batch(path: Path):
    case = DcnCase(0, 5, 6, 8, make_geometry(3, 1, 1, 1, 2, 1.0, False), center=True)
    with path.running():
        arguments = case.arguments(torch.float32, path.device)
        output = run(case, arguments)
        assert output.shape == (0, 5, 6, 16)
        grads = torch.autograd.grad(output.sum(), arguments)
        assert [grad.shape for grad in grads] == [argument.shape for argument in arguments]


@pytest.mark.parametrize("path", MAIN_PATHS)
def test_non_contiguous(path: Path):
    case = DCN_CASES[1]
    with path.running():
        plain = case.arguments(torch.float32, path.device)
        strided = [
            argument.detach().permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0).requires_grad_()
            for argument in plain
        ]
        assert not strided[0].is_contiguous()
        compare(case, path, strided)
        summed = torch.autograd.grad(run(case, strided).sum(), strided[0])[0]  # an expanded gradient
        output = run(case, plain)
        assert torch.equal(summed, torch.autograd.grad(output, plain[0], torch.ones_like(output))[0])


@pytest.mark.parametrize("path", ALL_PATHS)
def test_gradcheck(path: Path):
    case = DcnCase(1, 3, 4, 5, make_geometry((3, 2), 1, 1, 1, 2, 0.5, False))
    centred = DcnCase(1, 3, 4, 4, make_geometry(3, 1, 1, 1, 2, 1.0, True), center=True)
    with path.running():
        for each in (case, centred):
            arguments = each.arguments(torch.float64, path.device)
            assert torch.autograd.gradcheck(
                lambda *leaves, each=each: run(each, list(leaves)), arguments, eps=1e-7, atol=1e-6, fast_mode=True
            )


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(0, 3), st.integers(1, 14), st.integers(1, 14)),
    groups=st.integers(1, 6),
    channels=st.integers(1, 40),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    offset_scale=st.sampled_from([0.5, 1.0, 2.0]),
    reach=st.sampled_from([1.0, 10.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_random_shapes(size, groups, channels, kernel, stride, padding, dilation, offset_scale, reach, dtype, seed):
    geometry = make_geometry(kernel, stride, padding, dilation, groups, offset_scale, False)
    output = geometry.output_size(size[1], size[2])
    if min(output) < 1:
        return
    case = DcnCase(*size, channels, geometry, reach, center=output == size[1:])
    path = Path("compiled")
    with path.running():
        compare(case, path, case.arguments(dtype, seed=seed))


def test_threads_change_nothing():
    """Bit for bit the same with any number of threads, forward and backward; several strips of columns, too."""
    cases = [
        DcnCase(1, 9, 40, 32, make_geometry(3, 1, 1, 1, 3, 1.0, False), center=True),
        DcnCase(3, 6, 7, 16, make_geometry(3, 1, 1, 1, 4, 1.0, False)),
        DcnCase(1, 5, 40, 512, make_geometry(3, 1, 1, 1, 4, 1.0, False)),
        # Two bands of rows.
        DcnCase(1, 57, 12, 16, make_geometry(3, 1, 1, 1, 4, 1.0, False), center=True),
        DcnCase(3, 50, 9, 8, make_geometry(3, 1, 1, 2, 2, 1.0, False), reach=40),
        DcnCase(2, 100, 7, 32, make_geometry(3, 2, 1, 1, 5, 1.0, False)),
    ]

    def compute(case: DcnCase) -> list[Tensor]:
        arguments = case.arguments(torch.float32)
        output = run(case, arguments)
        return [output, *torch.autograd.grad(output.square().sum(), arguments)]

    for case in cases:
        assert_equal_over_threads((1, 2, 3, 8), lambda case=case: compute(case))


@pytest.mark.parametrize("path", MAIN_PATHS)
def test_deterministic_mode(path: Path):
    case = DCN_CASES[1]
    with path.running(), deterministic():
        compare(case, path, case.arguments(torch.float32, path.device))


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width", "groups"), [(120, 214, 10), (60, 107, 20), (30, 54, 40), (15, 27, 80)])
def test_sizes_of_internimage_h(height: int, width: int, groups: int):
    """The four stages of InternImage-H for a frame of 480x853."""
    case = DcnCase(1, height, width, 32, make_geometry(3, 1, 1, 1, groups, 1.0, False), center=True)
    path = Path("compiled")
    with path.running():
        compare(case, path, case.arguments(torch.float32))
