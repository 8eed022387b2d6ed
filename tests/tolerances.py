"""How far a result may be from what it is compared with: the one table of all tests.

An entry is (relative, absolute), per operation and dtype of the result. A test names the operation; where it compares
with a float64 oracle, the result's own dtype counts. Tests of the compiled operators measure errors relative to the
largest number, see :data:`OPERATORS`. It needs nothing but torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Where a dtype has no entry, no test compares it so.
TABLE: dict[str, dict[torch.dtype, tuple[float, float]]] = {
    # The same numbers: nothing was computed, or the same in the same order.
    "same": {
        torch.float64: (0, 0),
        torch.float32: (0, 0),
        torch.bfloat16: (0, 0),
        torch.float16: (0, 0),
    },
    # A few operations on each number.
    "formula": {torch.float64: (1e-13, 1e-13), torch.float32: (1e-6, 1e-7)},
    # One rounding of a number of about 1.
    "rounding": {torch.float32: (0, 1e-7)},
    # Probabilities, or other numbers of about 1, after a few operations: no relative part.
    "unit": {torch.float64: (0, 1e-12), torch.float32: (0, 1e-6)},
    # Bilinear samples and sums of numbers of about 1.
    "sample": {torch.float32: (0, 1e-5)},
    # Sums, means and softmaxes over many numbers.
    "sum": {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-6)},
    # A layer, or a loss.
    "layer": {
        torch.float64: (1e-11, 1e-11),
        torch.float32: (1e-5, 1e-5),
        torch.bfloat16: (0.05, 0.05),
        torch.float16: (0.05, 0.05),
    },
    # A layer or loss of inputs that were rounded to half precision; half: of parameters that were, too.
    "half inputs": {torch.float32: (0.02, 0.02), torch.bfloat16: (0.1, 0.1), torch.float16: (0.1, 0.1)},
    # Several layers, or a layer in another batch, another order, or another program.
    "network": {torch.float64: (1e-9, 1e-9), torch.float32: (1e-4, 1e-5)},
    # A whole network against another library's.
    "peer": {torch.float32: (1e-4, 1e-4)},
    # The same, for logits of masks, which are sums of hundreds of products of features.
    "masks": {torch.float32: (1e-4, 2e-4)},
    # Gradients of a whole network or criterion.
    "gradient": {torch.float64: (1e-10, 1e-10), torch.float32: (1e-3, 1e-6)},
    # Positions of some hundred pixels.
    "position": {torch.float32: (0, 1e-3)},
    # Interpolated colours, 0..255.
    "colour": {torch.float32: (0, 5e-3)},
    # Probabilities that were kept in half precision in between.
    "stored half": {torch.float32: (0, 1e-3)},
    # A graph runtime's own kernels.
    "runtime": {torch.float32: (1e-3, 1e-4)},
}
# Of the compiled operators, relative to the largest number, outputs and gradients; the short types get two units in the
# last place on top of float32's, since that is what they are computed in.
OPERATORS = {
    "output": {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10},
    "gradient": {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-10},
}


def tolerance(operation: str, dtype: torch.dtype) -> tuple[float, float]:
    """(relative, absolute); integers are exact in every operation."""
    return TABLE[operation][dtype] if dtype.is_floating_point else (0, 0)


def assert_close(found: Any, expected: Any, operation: str, *, largest: bool = False, what: str = "") -> None:
    """Compare tensors or arrays, or dictionaries, lists and tuples of them.

    Args:
        found: its dtype chooses the tolerance.
        expected: of the same shape, and of the same or a wider dtype.
        operation: row of :data:`TABLE`.
        largest: the absolute part counts relative to the largest number, if that is above 1, and is all there is.
        what: said when it fails.
    """
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), what
        for name, value in expected.items():
            assert_close(found[name], value, operation, largest=largest, what=f"{what} {name}")
        return
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), what
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, operation, largest=largest, what=f"{what} {number}")
        return
    found, expected = torch.as_tensor(found).detach().cpu(), torch.as_tensor(expected).detach().cpu()
    relative, absolute = tolerance(operation, found.dtype)
    if largest:
        relative, absolute = 0, absolute * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    assert torch.promote_types(found.dtype, expected.dtype) == expected.dtype, f"{found.dtype}, not {expected.dtype}"
    message = (lambda text: f"{what}: {text}") if what else None
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=relative, atol=absolute, msg=message)


def approx(expected: Any, operation: str, dtype: torch.dtype = torch.float32) -> Any:
    """``pytest.approx`` of numbers that were computed in a dtype."""
    import pytest

    relative, absolute = tolerance(operation, dtype)
    return pytest.approx(expected, rel=relative, abs=absolute)


def is_close(found: Tensor, expected: Tensor, operation: str) -> bool:
    """Whether :func:`assert_close` would pass."""
    relative, absolute = tolerance(operation, found.dtype)
    return torch.allclose(found.to(expected.dtype), expected, rtol=relative, atol=absolute)


def assert_operator(found: Tensor, expected: Tensor, part: str, what: str) -> None:
    """Compare a compiled operator's result with a float64 oracle that was given the same (rounded) inputs.

    Errors are relative to the largest number; of half types each number may in addition be off by two units in its own
    last place.

    Args:
        found, expected: of one shape.
        part: "output" or "gradient".
        what: said when it fails.
    """
    assert found.shape == expected.shape, what
    assert bool(torch.isfinite(found).all()), f"{what} is not finite"
    found, expected = found.detach().cpu(), expected.cpu()
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    error = (found.double() - expected).abs()
    short = found.dtype in (torch.bfloat16, torch.float16)
    allowed = torch.full_like(error, OPERATORS[part][torch.float32 if short else found.dtype] * largest)
    if short:
        limits = torch.finfo(found.dtype)
        allowed = allowed + 2 * limits.eps * expected.abs().clamp(min=limits.smallest_normal)
    worst = float((error - allowed).max()) if error.numel() else 0.0
    assert worst <= 1e-300, f"{what}: error {float(error.max()):.3g}, largest number {largest:.3g}"


def assert_kernel(found: Tensor, expected: Tensor, part: str, what: str) -> None:
    """As :func:`assert_operator` for a kernel that was given a problem of its own, on any device.

    Numbers below a thousandth count as a thousandth, and half types are off by units of the largest number, since
    atomics add in any order.
    """
    expected = expected.detach().double().cpu().reshape(found.shape)
    assert bool(torch.isfinite(found).all()), f"{what} is not finite"
    if not found.numel():
        return
    tolerance = OPERATORS[part][found.dtype]
    error = float((found.detach().double().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-3))
    assert error <= tolerance, f"{what}: {error:.2e} > {tolerance:.0e}"
