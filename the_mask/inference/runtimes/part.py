"""A part of a model whose calls run in a runtime's sessions, one session per layout of arguments.

A layout is the structure of the arguments, the shapes and types of their tensors, and the values of everything else.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from the_mask.inference.runtimes.sessions import Session

# Beyond this number of layouts (sizes, batch sizes), the least recently used session is dropped.
MOST_SESSIONS = 8
_logger = logging.getLogger("the_mask.runtimes")


class Flat(nn.Module):
    """A function of structured arguments as a module of tensors.

    Args:
        module: holds the parameters.
        function: name of the method that is called.
        spec: structure of ``(args, kwargs)``.
        leaves: all leaves; tensors are replaced by the arguments of a call.
    """

    def __init__(self, module: nn.Module, function: str, spec: pytree.TreeSpec, leaves: Sequence[Any]) -> None:
        super().__init__()
        self.module, self.function, self.spec = module, function, spec
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.result_spec: pytree.TreeSpec | None = None
        self.results: list[tuple[bool, Any]] = []

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.constants)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        results, self.result_spec = pytree.tree_flatten(call(self.module, self.function, args, kwargs))
        self.results = [(True, None) if isinstance(leaf, Tensor) else (False, leaf) for leaf in results]
        return tuple(leaf for leaf in results if isinstance(leaf, Tensor))

    def rebuilt(self, tensors: Sequence[Tensor]) -> Any:
        """Rebuild the structured result from a session's tensors."""
        assert self.result_spec is not None
        left = iter(tensors)
        leaves = [next(left) if is_tensor else constant for is_tensor, constant in self.results]
        return pytree.tree_unflatten(leaves, self.result_spec)


Opener = Callable[["Part", Flat, list[Tensor]], Session]


class Part:
    """Stands for a method of a module, such as ``forward``, and runs its calls in sessions.

    It is set as an attribute of the module, where it takes precedence over the method of its class; the module itself,
    its parameters and its state dict stay as they are. Calls that record gradients run the method. Sessions hold the
    weights that they were made from, so new weights (``load_state_dict``, training) end them.

    Attributes:
        digest: of the module and its weights, where somebody has asked for it; "" otherwise.
    """

    def __init__(self, name: str, module: nn.Module, function: str, open_session: Opener) -> None:
        """
        Args:
            name: of the part, for messages.
            module: whose method is run; its parameters are not copied.
            function: name of the method.
            open_session: makes the session of a layout.
        """
        self.name, self.module, self.function = name, module, function
        self._open_session = open_session
        self._sessions: OrderedDict[Any, tuple[Flat, Session]] = OrderedDict()
        self._lock = threading.Lock()
        self._weights: list[Tensor] = []
        self._version = -1
        self.digest = ""
        setattr(module, function, self)

    def remove(self) -> None:
        """Give the module its own method back."""
        delattr(self.module, self.function)

    def forget(self) -> None:
        """Drop all sessions; the next calls open new ones."""
        with self._lock:
            self._sessions.clear()

    def _count_changes(self) -> int:
        """Number of writes into the weights so far."""
        if not self._weights:  # listed once: to walk through the modules takes as long as a small network
            every = (*self.module.parameters(), *self.module.buffers())
            self._weights = [x for x in every if not x.is_inference()]
        return sum(x._version for x in self._weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        """The part of a copied module, which makes sessions of its own: its weights may become others."""
        return Part(self.name, copy.deepcopy(self.module, memo), self.function, self._open_session)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if torch.is_grad_enabled() or torch.compiler.is_exporting():
            return call(self.module, self.function, args, kwargs)
        layout = (spec, tuple(_describe(leaf) for leaf in leaves))
        with self._lock:
            changes = self._count_changes()
            if self._version != changes:
                self._version, self.digest = changes, ""
                self._sessions.clear()
            if layout not in self._sessions:
                flat = Flat(self.module, self.function, spec, leaves).eval()
                self._sessions[layout] = (flat, self._open_session(self, flat, tensors))
                while len(self._sessions) > MOST_SESSIONS:
                    self._sessions.popitem(last=False)
            self._sessions.move_to_end(layout)
            flat, session = self._sessions[layout]
        return flat.rebuilt(session(tensors))


def call(module: nn.Module, function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a method of a module's class, past a part that stands for it."""
    return getattr(type(module), function)(module, *args, **kwargs)


def eager_results(flat: Flat, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Results of the original; also records their structure in ``flat``."""
    with torch.no_grad():
        return list(flat(*tensors))


def _describe(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.dtype)
    if isinstance(leaf, (int, float, str, bool, bytes, type(None))):
        return leaf
    raise TypeError(f"an argument of type {type(leaf).__name__} cannot be part of a runtime's call")


def register(*kinds: type) -> None:
    """Register dataclasses as arguments and results of parts."""
    for kind in kinds:
        if kind not in pytree.SUPPORTED_NODES:
            names = [field.name for field in dataclasses.fields(kind)]
            pytree.register_dataclass(kind, field_names=names, drop_field_names=[])
