"""The CUDA kernels' source, run on the CPU by an emulator of threads, against the float64 oracle.

Everything but the storage types bfloat16 and float16, vector atomics and speed is covered without a GPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tolerances import assert_kernel
from torch import Tensor

from the_mask.ops.dcn.geometry import Geometry, make_geometry
from the_mask.ops.dcn.reference import dcnv3_reference
from the_mask.ops.labels.reference import upsample_argmax_reference
from the_mask.ops.labels.taps import axis_taps
from the_mask.ops.msda.reference import ms_deform_attn_reference

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
MAX_LEVELS = 64
DTYPES = (torch.float64, torch.float32)


class Problem(ctypes.Structure):
    _fields_ = (
        [("storage", ctypes.c_int)]
        + [(name, ctypes.c_int64) for name in ("images", "positions", "rows")]
        + [(name, ctypes.c_int) for name in ("heads", "channels", "points")]
        + [(name, ctypes.c_void_p) for name in ("value", "places", "weights", "share", "output", "grad_output")]
        + [(name, ctypes.c_void_p) for name in ("grad_value", "grad_places", "grad_weights", "grad_share")]
        + [("deterministic", ctypes.c_bool)]
    )


class MsdaGeometry(ctypes.Structure):
    _fields_ = [
        ("levels", ctypes.c_int),
        ("points_per_level", ctypes.c_int),
        ("positions", ctypes.c_int64),
        ("device_sizes", ctypes.c_void_p),
        ("table", ctypes.c_int * (3 * MAX_LEVELS)),
    ]


class DcnGeometry(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int) for name in ("height", "width", "output_width", "kernel_height", "removed")]
        + [(name, ctypes.c_int) for name in ("stride_y", "stride_x", "dilation_y", "dilation_x")]
        + [(name, ctypes.c_int) for name in ("center_y", "center_x", "base_y", "base_x")]
        + [("offset_scale", ctypes.c_double)]
    )


def build(folder: Path, *defines: str) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    path = folder / "emulated.so"
    # Contraction to fused multiply-add would move locations off integers; CUDA code forbids it for these by itself.
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", *defines]
    folders = (ROOT / "csrc" / "cuda", ROOT / "benchmarks" / "cuda_baseline", HERE)
    paths = [*(f"-I{each}" for each in folders), str(HERE / "cuda_emulated.cpp"), "-o", str(path)]
    subprocess.run([compiler, *flags, "-fPIC", "-shared", *paths], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.run_msda.restype = loaded.run_dcn.restype = ctypes.c_char_p
    if "-DSCALAR_BASELINE" not in defines:
        loaded.run_labels_here.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The scalar kernels that benchmarks compare with."""
    return build(tmp_path_factory.mktemp("baseline"), "-DSCALAR_BASELINE")


class Call(NamedTuple):
    """value [N, S, M, D], places [N, R, M, K, 2], weights [N, R, M, K], share [N, R, M] or None."""

    value: Tensor
    places: Tensor
    weights: Tensor
    share: Tensor | None
    grad: Tensor


def run(
    library: ctypes.CDLL,
    call: Call,
    geometry: MsdaGeometry | DcnGeometry,
    *,
    deterministic: bool = False,
    blocks: int = 1 << 30,
) -> tuple[Tensor, list[Tensor]]:
    """Output and the gradients of value, places, weights (and share) from the emulated kernels."""
    function = library.run_msda if isinstance(geometry, MsdaGeometry) else library.run_dcn
    output = torch.full_like(call.grad, float("nan"))
    inputs = [call.value, call.places, call.weights] + ([] if call.share is None else [call.share])
    grads = [torch.full_like(tensor, float("nan")) for tensor in inputs]
    grads[0].zero_()
    pointers = [tensor.data_ptr() for tensor in inputs] + ([0] if call.share is None else [])
    grad_pointers = [tensor.data_ptr() for tensor in grads] + ([0] if call.share is None else [])
    images, positions, heads, channels = call.value.shape
    problem = Problem(
        int(call.value.dtype == torch.float64),
        images,
        positions,
        call.weights.shape[1],
        heads,
        channels,
        call.weights.shape[3],
        *pointers,
        output.data_ptr(),
        call.grad.data_ptr(),
        *grad_pointers,
        deterministic,
    )
    for backward in (0, 1):
        failure = function(ctypes.byref(problem), ctypes.byref(geometry), backward, blocks)
        assert failure is None, failure
    return output, grads


def random_tensor(*shape: int, dtype: torch.dtype, seed: int, aligned: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.tensor(shape).prod())
    storage = torch.randn(size + 1, generator=generator, dtype=torch.float64).to(dtype)
    return storage[0 if aligned else 1 :][:size].view(shape)


# ----------------------------------------------------------------------------------- multi-scale deformable attention


def msda_geometry(levels: list[tuple[int, int]], points: int, device_sizes: Tensor | None = None) -> MsdaGeometry:
    geometry = MsdaGeometry(len(levels), points, sum(h * w for h, w in levels))
    start = 0
    for index, (height, width) in enumerate(levels):
        geometry.table[3 * index : 3 * index + 3] = [height, width, start]
        start += height * width
    if device_sizes is not None:
        geometry.device_sizes = device_sizes.data_ptr()
        geometry.table = (ctypes.c_int * (3 * MAX_LEVELS))()
    return geometry


def msda_oracle(call: Call, levels: list[tuple[int, int]], points: int) -> tuple[Tensor, list[Tensor]]:
    images, rows, heads, _ = call.weights.shape
    value, places, weights = (t.double().clone().requires_grad_() for t in (call.value, call.places, call.weights))
    output = ms_deform_attn_reference(
        value,
        levels,
        places.view(images, rows, heads, len(levels), points, 2),
        weights.view(images, rows, heads, len(levels), points),
    )
    return output, list(torch.autograd.grad(output, (value, places, weights), call.grad.double().view_as(output)))


MSDA_CASES = {  # levels, N, Q, M, D, P
    "wide": ([(5, 7), (3, 4), (1, 1)], 2, 9, 3, 32, 4),
    "one-lane": ([(4, 5)], 1, 300, 2, 4, 3),
    "one-channel": ([(2, 2), (5, 3)], 3, 5, 2, 1, 1),
    "two-lanes": ([(6, 5)], 1, 11, 3, 8, 8),
    "odd-channels": ([(3, 3), (4, 2), (1, 6), (2, 1), (1, 1)], 2, 6, 2, 30, 4),
    "many-channels": ([(3, 5)], 1, 3, 2, 264, 5),
    "more-odd-channels": ([(3, 5)], 1, 3, 2, 71, 5),
    "no-points": ([(3, 5)], 1, 3, 2, 8, 0),
}


def msda_call(case: str, dtype: torch.dtype, aligned: bool = True) -> tuple[Call, list[tuple[int, int]], int]:
    levels, images, rows, heads, channels, points = MSDA_CASES[case]
    positions, per_item = sum(h * w for h, w in levels), len(levels) * points
    generator = torch.Generator().manual_seed(3)
    places = torch.rand(images, rows, heads, per_item, 2, generator=generator, dtype=torch.float64) * 2 - 0.5
    call = Call(
        random_tensor(images, positions, heads, channels, dtype=dtype, seed=1, aligned=aligned),
        places.to(dtype),
        random_tensor(images, rows, heads, per_item, dtype=dtype, seed=2),
        None,
        random_tensor(images, rows, heads, channels, dtype=dtype, seed=4),
    )
    return call, levels, points


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", MSDA_CASES)
def test_ms_deform_attn(library: ctypes.CDLL, case: str, dtype: torch.dtype, deterministic: bool) -> None:
    call, levels, points = msda_call(case, dtype)
    sizes = torch.tensor(levels) if deterministic else None
    output, grads = run(
        library, call, msda_geometry(levels, max(points, 1), sizes), deterministic=deterministic, blocks=2
    )
    expected, expected_grads = msda_oracle(call, levels, points)
    assert_kernel(output, expected, "output", "output")
    for name, found, wanted in zip(("value", "locations", "weights"), grads, expected_grads, strict=True):
        assert_kernel(found, wanted, "gradient", f"gradient of {name}")


@pytest.mark.slow
def test_value_that_begins_anywhere_in_its_storage(library: ctypes.CDLL) -> None:
    call, levels, points = msda_call("wide", torch.float32, aligned=False)
    output, _ = run(library, call, msda_geometry(levels, points))
    assert_kernel(output, msda_oracle(call, levels, points)[0], "output", "output")


@pytest.mark.slow
def test_sizes_of_levels_that_do_not_fit_are_noticed(library: ctypes.CDLL) -> None:
    call, levels, points = msda_call("wide", torch.float32)
    with pytest.raises(AssertionError, match="do not add up"):
        run(library, call, msda_geometry(levels, points, torch.tensor([(5, 7), (3, 5), (1, 1)])))


@pytest.mark.slow
def test_locations_that_are_not_numbers_or_far_outside_contribute_nothing(library: ctypes.CDLL) -> None:
    call, levels, points = msda_call("wide", torch.float32)
    wild = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e9])
    call.places.view(-1)[::7] = wild.repeat(1000)[: call.places.view(-1)[::7].numel()]
    output, grads = run(library, call, msda_geometry(levels, points))
    tame = call._replace(places=torch.where(call.places.abs() < 1e6, call.places, torch.full((), -9.0)))
    expected, expected_grads = msda_oracle(tame, levels, points)
    assert_kernel(output, expected, "output", "output")
    for found, wanted in zip(grads, expected_grads, strict=True):
        assert_kernel(found, wanted, "gradient", "gradient")


@pytest.mark.slow
def test_corners_outside_are_not_read(library: ctypes.CDLL) -> None:
    """A point beyond the right edge next to infinity in the following row."""
    value = torch.ones(1, 6, 1, 4)
    value[0, 3] = float("inf")  # first pixel of the second row
    places = torch.tensor([3.25, 0.5]).div(torch.tensor([3.0, 2.0])).view(1, 1, 1, 1, 2)  # x = 2.75, y = 0
    places[..., 1] = 0.25
    call = Call(value, places.contiguous(), torch.ones(1, 1, 1, 1), None, torch.ones(1, 1, 1, 4))
    output, grads = run(library, call, msda_geometry([(2, 3)], 1))
    assert torch.allclose(output, torch.full((4,), 0.25))
    assert all(torch.isfinite(grad).all() for grad in grads)


# ------------------------------------------------------------------------------------------------------------- DCNv3


class DcnCase(NamedTuple):
    size: tuple[int, int] = (5, 7)
    images: int = 2
    groups: int = 3
    channels: int = 16
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    scale: float = 1.0
    remove_center: bool = False
    share: bool = False
    spread: float = 2.0


DCN_CASES = {
    "plain": DcnCase(),
    "share": DcnCase(share=True, channels=32),
    "share-odd": DcnCase(share=True, channels=30, groups=1, scale=2.0),
    "rectangle": DcnCase(kernel=(2, 3), padding=(1, 0), channels=4),
    "stride": DcnCase(size=(9, 8), stride=(2, 1), padding=(2, 1), dilation=(1, 3), scale=0.5, channels=2),
    "no-center": DcnCase(kernel=(5, 5), padding=(2, 2), remove_center=True, channels=8, images=1),
    "one-pixel": DcnCase(size=(1, 1), images=3, groups=5, channels=1),
    "far": DcnCase(spread=10.0, channels=64, groups=1),
    "on-integers": DcnCase(spread=0.0),
    "on-integers-scaled": DcnCase(spread=0.0, scale=2.0, padding=(2, 2)),
}


def dcn_call(case: DcnCase, dtype: torch.dtype) -> tuple[Call, Geometry, tuple[int, int]]:
    geometry = make_geometry(
        case.kernel, case.stride, case.padding, case.dilation, case.groups, case.scale, case.remove_center
    )
    height, width = case.size
    rows, columns = geometry.output_size(height, width)
    items = (case.images, rows * columns, case.groups)
    call = Call(
        random_tensor(case.images, height * width, case.groups, case.channels, dtype=dtype, seed=1),
        random_tensor(*items, geometry.points, 2, dtype=dtype, seed=2) * case.spread,
        random_tensor(*items, geometry.points, dtype=dtype, seed=3),
        random_tensor(*items, dtype=dtype, seed=5).sigmoid() if case.share else None,
        random_tensor(*items, case.channels, dtype=dtype, seed=4),
    )
    return call, geometry, (rows, columns)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DCN_CASES)
def test_dcnv3(library: ctypes.CDLL, name: str, dtype: torch.dtype, deterministic: bool) -> None:
    case = DCN_CASES[name]
    call, geometry, (rows, columns) = dcn_call(case, dtype)
    height, width = case.size
    center_y, center_x = geometry.center
    described = DcnGeometry(
        height,
        width,
        columns,
        case.kernel[0],
        geometry.points // 2 if case.remove_center else -1,
        *case.stride,
        *case.dilation,
        center_y,
        center_x,
        center_y - case.padding[0],
        center_x - case.padding[1],
        case.scale,
    )
    output, grads = run(library, call, described, deterministic=deterministic, blocks=2)
    inputs = [call.value, call.places, call.weights] + ([] if call.share is None else [call.share])
    leaves = [tensor.double().clone().requires_grad_() for tensor in inputs]
    expected = dcnv3_reference(
        leaves[0].view(case.images, height, width, -1),
        leaves[1].view(case.images, rows, columns, -1),
        leaves[2].view(case.images, rows, columns, -1),
        geometry,
        leaves[3].view(case.images, rows, columns, -1) if call.share is not None else None,
    )
    wanted_grads = torch.autograd.grad(expected, leaves, call.grad.double().view_as(expected))
    assert_kernel(output, expected, "output", "output")
    for which, found, wanted in zip(("x", "offset", "mask", "scale"), grads, wanted_grads):
        assert_kernel(found, wanted, "gradient", f"gradient of {which}")


# ------------------------------------------------------------------------------------------------------------ labels


class LabelProblem(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int) for name in ("K", "h", "w", "H", "W", "taps")]
        + [(name, ctypes.c_void_p) for name in ("scores", "row_start", "row_weights", "column_start")]
        + [(name, ctypes.c_void_p) for name in ("column_weights", "labels")]
        + [("bytes", ctypes.c_bool)]
    )


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 7, 300])
@pytest.mark.parametrize("output", [(18, 26), (31, 20), (5, 3)])
def test_labels(library: ctypes.CDLL, classes: int, output: tuple[int, int]) -> None:
    scores = random_tensor(classes, 5, 7, dtype=torch.float32, seed=1)
    arrays = (*axis_taps(5, 4, 18, output[0]), *axis_taps(7, 4, 26, output[1]))
    taps = max(arrays[1].shape[1], arrays[3].shape[1])
    tensors = [torch.from_numpy(a) for a in arrays]
    for axis in (1, 3):
        tensors[axis] = torch.nn.functional.pad(tensors[axis], (0, taps - tensors[axis].shape[1])).contiguous()
    labels = torch.full(output, 99, dtype=torch.uint8 if classes <= 255 else torch.int32)
    pointers = [tensor.data_ptr() for tensor in (scores, *tensors, labels)]
    problem = LabelProblem(classes, 5, 7, *output, taps, *pointers, classes <= 255)
    failure = library.run_labels_here(ctypes.byref(problem), 1)
    assert failure is None, failure
    expected = upsample_argmax_reference(scores, *tensors)
    assert (labels == expected).double().mean() > 0.999


# ------------------------------------------------------------------------------------ the scalar kernels of benchmarks


@pytest.mark.slow
@pytest.mark.parametrize("case", ["wide", "one-channel", "odd-channels", "no-points"])
def test_scalar_ms_deform_attn(baseline: ctypes.CDLL, case: str) -> None:
    test_ms_deform_attn(baseline, case, torch.float64, False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["share-odd", "stride", "no-center", "on-integers"])
def test_scalar_dcnv3(baseline: ctypes.CDLL, name: str) -> None:
    test_dcnv3(baseline, name, torch.float64, False)
