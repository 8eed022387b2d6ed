"""What the operator tests share: the paths to test, and random arguments.

Axes as in the_mask.ops: ``N`` batch, ``S`` positions, ``M`` heads, ``D`` channels per head or group, ``Q`` queries,
``L`` levels, ``P`` points, ``G`` groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from the_mask.ops import use
from the_mask.ops.dcn.geometry import Geometry, make_geometry
from the_mask.ops.extension import missing_for

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CPU_CODES = ("baseline", "AVX2", "AVX-512")


@dataclass(frozen=True)
class Path:
    """One way to run the operators: a mode, the instruction set of the compiled CPU kernels, a device."""

    mode: str
    code: str = "auto"
    device: str = "cpu"

    def __str__(self) -> str:
        return self.mode + ("" if self.mode != "compiled" else f"-{self.device}-{self.code}")

    @property
    def exact_at_integers(self) -> bool:
        """Whether derivatives at integer positions are the right-sided ones; grid_sample rounds positions."""
        return self.mode != "portable"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run everything inside on this path, or skip the test with the reason."""
        if self.device == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if self.mode != "compiled":
            with use(self.mode):
                yield
            return
        missing = missing_for(self.device)
        if missing is not None:
            pytest.skip(missing)
        if self.device == "cpu":
            try:
                torch.ops.the_mask_kernels.force_cpu_capability(self.code)
            except RuntimeError as error:
                pytest.skip(str(error).splitlines()[0])
        try:
            with use("compiled"):
                yield
        finally:
            torch.ops.the_mask_kernels.force_cpu_capability("auto")


PYTHON_PATHS = [Path("reference"), Path("portable")]
CPU_PATHS = [*PYTHON_PATHS, *(Path("compiled", code) for code in CPU_CODES)]
CUDA_PATHS = [pytest.param(Path("compiled", device="cuda"), marks=pytest.mark.cuda, id="compiled-cuda")]
ALL_PATHS = [*(pytest.param(path, id=str(path)) for path in CPU_PATHS), *CUDA_PATHS]
# One of each kind, for tests that do not depend on the instruction set.
MAIN_PATHS = [*(pytest.param(path, id=str(path)) for path in [*PYTHON_PATHS, Path("compiled")]), *CUDA_PATHS]


def assert_equal_over_threads(counts: Iterable[int], compute: Callable[[], Sequence[Tensor]]) -> None:
    """Compiled results are the same bit for bit with every number of threads."""
    before, results = torch.get_num_threads(), []
    with Path("compiled").running():
        try:
            for count in counts:
                torch.set_num_threads(count)
                results.append(compute())
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """``torch.use_deterministic_algorithms`` inside."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def away_from_integers(generator: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Random float64 positions between ``low`` and ``high``, a hundredth at least from every integer."""
    whole = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    return whole.floor() + 0.01 + 0.98 * torch.rand(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class MsdaCase:
    """Sizes of one multi-scale deformable attention problem."""

    batch: int
    heads: int
    channels: int
    queries: int
    points: int
    levels: tuple[tuple[int, int], ...]

    def arguments(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Leaves (value, sampling_locations, attention_weights); locations in about -0.5..1.5."""
        generator = torch.Generator().manual_seed(seed)
        work = work_dtype(dtype)
        positions = sum(height * width for height, width in self.levels)
        value = torch.randn(self.batch, positions, self.heads, self.channels, generator=generator, dtype=torch.float64)
        per_level = []
        for height, width in self.levels:
            shape = (self.batch, self.queries, self.heads, self.points)
            x = (away_from_integers(generator, shape, -0.5 * width - 1, 1.5 * width) + 0.5) / width
            y = (away_from_integers(generator, shape, -0.5 * height - 1, 1.5 * height) + 0.5) / height
            per_level.append(torch.stack((x, y), dim=-1))
        locations = torch.stack(per_level, dim=3)
        weights = torch.rand(locations.shape[:-1], generator=generator, dtype=torch.float64)
        return (
            value.to(device, dtype).requires_grad_(),
            locations.to(device, work).requires_grad_(),
            weights.to(device, work).requires_grad_(),
        )


# Both the packed kernel (many queries) and the direct one (few) are met; D below, at and off multiples of vectors.
MSDA_CASES = [
    MsdaCase(1, 1, 1, 1, 1, ((1, 1),)),
    MsdaCase(2, 3, 32, 40, 4, ((5, 7), (3, 4), (1, 1))),
    MsdaCase(3, 2, 16, 1, 4, ((17, 30), (5, 2))),
    MsdaCase(1, 4, 30, 9, 8, ((2, 5),)),
    MsdaCase(2, 1, 64, 13, 1, ((5, 5), (4, 3), (3, 2), (2, 2), (1, 1))),
    MsdaCase(1, 2, 71, 11, 3, ((6, 1), (1, 6))),
    MsdaCase(1, 5, 4, 21, 5, ((9, 4), (30, 17))),
    MsdaCase(1, 1, 128, 6, 4, ((4, 5), (2, 3))),
]


@dataclass(frozen=True)
class DcnCase:
    """Sizes of one DCNv3 problem."""

    batch: int
    height: int
    width: int
    channels: int
    geometry: Geometry
    reach: float = 2.0
    center: bool = False

    def arguments(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Tensor]:
        """Leaves x, offset, mask (and center_feature_scale)."""
        generator = torch.Generator().manual_seed(seed)
        work, geometry = work_dtype(dtype), self.geometry
        rows, columns = geometry.output_size(self.height, self.width)
        shape = (self.batch, rows, columns, geometry.groups, geometry.points, 2)
        x = torch.randn(
            self.batch,
            self.height,
            self.width,
            geometry.groups * self.channels,
            generator=generator,
            dtype=torch.float64,
        )
        # Choose where the points go, away from integers, and derive the offset from it.
        moved = away_from_integers(generator, shape, -self.reach, self.reach)
        taps = torch.tensor(geometry.taps(), dtype=torch.float64)
        offset = ((moved + (taps * geometry.offset_scale).floor()) / geometry.offset_scale - taps).flatten(3)
        mask = torch.rand(*shape[:-1], generator=generator, dtype=torch.float64).softmax(-1).flatten(3)
        leaves = [x.to(device, dtype), offset.to(device, work), mask.to(device, work)]
        if self.center:
            share = torch.rand(self.batch, self.height, self.width, geometry.groups, generator=generator)
            leaves.append(share.to(device, work))
        return [leaf.requires_grad_() for leaf in leaves]


DCN_CASES = [
    DcnCase(1, 1, 1, 1, make_geometry(1, 1, 0, 1, 1, 1.0, False)),
    DcnCase(2, 5, 17, 16, make_geometry(3, 1, 1, 1, 4, 1.0, False), center=True),
    DcnCase(1, 17, 5, 32, make_geometry(3, 1, 1, 1, 5, 2.0, False), reach=10),
    DcnCase(3, 5, 5, 4, make_geometry(5, 1, 2, 1, 10, 0.5, False), center=True),
    DcnCase(1, 30, 17, 30, make_geometry((3, 2), (2, 1), (1, 2), (1, 3), 1, 1.0, False)),
    DcnCase(2, 7, 9, 64, make_geometry(2, 2, (0, 1), 2, 1, 0.5, False), reach=10),
    DcnCase(1, 6, 5, 71, make_geometry((1, 5), 1, (2, 1), (1, 1), 1, 2.0, False)),
    DcnCase(1, 9, 8, 8, make_geometry(3, 1, 2, 2, 3, 1.0, True), center=True),
    # Many rows, which the CPU backward divides into two bands; points that fall into the other one, or far outside.
    DcnCase(1, 51, 6, 8, make_geometry(3, 1, 1, 1, 2, 1.0, False), center=True),
    DcnCase(1, 97, 5, 16, make_geometry(3, 2, 1, 1, 3, 1.0, False), reach=30),
    DcnCase(2, 3, 4, 4, make_geometry(3, 1, 25, 2, 1, 1.0, False), reach=20),
]
