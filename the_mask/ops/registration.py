"""Registers Python functions as operators of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def operator(name: str, schema: str, differentiable: bool = False) -> Callable[[F], F]:
    """Register a function as ``the_mask::name``, for tensors of every device.

    ``torch.library.custom_op`` does the same, but its operators import torch.compile (a second) when they are first
    called.

    Args:
        name: of the operator.
        schema: its arguments and results, ``"(Tensor x) -> Tensor"``.
        differentiable: the caller registers gradients; without them, backward is an error.
    """
    full = f"the_mask::{name}"

    def register(function: F) -> F:
        torch.library.define(full, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(full, "default", function)
        if not differentiable:
            torch.library.register_autograd(full, refuse)
        return function

    def refuse(*_: Any) -> None:
        raise RuntimeError(f"{full} has no gradient")

    return register
