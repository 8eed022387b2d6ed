"""Stream states as lists of named tensors, the inputs and outputs of exported programs.

A state is a nested dict or list of tensors, numbers, strings and None. Its tensors are named by their path, such as
``ring.0.maps.2``; everything else, and tensors without elements, is kept as it was in the example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

State = Any


def named_tensors(state: State, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The non-empty tensors of a state with their names, in a fixed order."""
    if isinstance(state, Tensor):
        if state.numel():
            yield path, state
        return
    if isinstance(state, Mapping):
        children = [(str(key), value) for key, value in state.items()]
    elif isinstance(state, (list, tuple)):
        children = [(str(number), value) for number, value in enumerate(state)]
    else:
        return
    for key, value in children:
        yield from named_tensors(value, f"{path}.{key}" if path else key)


def with_tensors(template: State, tensors: Sequence[Tensor]) -> State:
    """The template with its tensors replaced, in the order of :func:`named_tensors`."""
    left = iter(tensors)
    filled = _replaced(template, lambda: next(left))
    if next(left, None) is not None:
        raise ValueError(f"{len(tensors)} tensors for a state with {len(list(named_tensors(template)))}")
    return filled


def _replaced(state: State, take: Callable[[], Tensor]) -> State:
    if isinstance(state, Tensor):
        return take() if state.numel() else state
    if isinstance(state, Mapping):
        return {key: _replaced(value, take) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_replaced(value, take) for value in state]
    return state


def layout(state: State) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of a state's tensors."""
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in named_tensors(state)]


def settle(advance: Callable[[State], State], state: State, most: int = 256) -> tuple[State, State]:
    """Advance a stream until the layout of its state no longer changes.

    Args:
        advance: one step, always with the same frame.
        state: state before the first frame.
        most: largest number of frames to try.

    Returns:
        The state after the first frame, and the first state whose layout equals that of the next one.

    Raises:
        ValueError: the state still grows after ``most`` frames.
    """
    first = state = advance(state)
    for _ in range(most):
        after = advance(state)
        if layout(after) == layout(state):
            return first, state
        state = after
    raise ValueError(f"the stream's state still changes its layout after {most} frames; a bounded state is needed")


def sources_of(full: State, first: State) -> list[int]:
    """For each tensor of ``full``, the tensor of ``first`` (the state after one frame) that fills it.

    If the layouts agree, the tensor of the same name and shape; else the one with the values that the tensor has when
    the first frame is repeated. So a stream starts as if the first frame had been repeated before.

    Raises:
        ValueError: no tensor of ``first`` equals a tensor of ``full``.
    """
    if layout(full) == layout(first):
        return list(range(len(layout(full))))
    candidates = list(named_tensors(first))
    sources = []
    for name, tensor in named_tensors(full):
        equal = [i for i, (_, other) in enumerate(candidates) if _same(tensor, other)]
        if not equal:
            raise ValueError(
                f"state tensor {name} cannot be filled from the first frame: the stream's start cannot be exported"
            )
        sources.append(equal[0])
    return sources


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a.float(), b.float(), atol=1e-6, rtol=1e-5)
