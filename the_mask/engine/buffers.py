"""A model's buffers as they were before an iteration, for a checkpoint of the last one that was finished."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class BufferCopies:
    """Copies of every buffer of a model, renewed where a buffer has changed or may have.

    Torch counts changes of tensors, but not those that batch norm makes to its statistics.
    """

    def __init__(self) -> None:
        # By name: the buffer, its count of changes, and the copy.
        self._copies: dict[str, tuple[Tensor, int, Tensor]] = {}

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Copy what has changed since the last call."""
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for name, buffer, uncounted in _buffers(model):
            kept = self._copies.get(name)
            if kept is None or kept[0] is not buffer or kept[2].shape != buffer.shape:
                self._copies[name] = (buffer, buffer._version, buffer.clone())
            elif uncounted or kept[1] != buffer._version:
                self._copies[name] = (buffer, buffer._version, kept[2])
                targets.append(kept[2])
                sources.append(buffer)
        if targets:
            torch._foreach_copy_(targets, sources)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put back what :meth:`take` has copied."""
        for name, buffer, uncounted in _buffers(model):
            kept = self._copies.get(name)
            if kept is None or (kept[0] is buffer and kept[1] == buffer._version and not uncounted):
                continue
            if kept[2].shape == buffer.shape:
                buffer.copy_(kept[2])
            else:
                path, _, leaf = name.rpartition(".")
                model.get_submodule(path)._buffers[leaf] = kept[2].clone()


def _buffers(model: nn.Module) -> list[tuple[str, Tensor, bool]]:
    """Name, buffer, and whether it may change uncounted."""
    return [
        (f"{path}.{leaf}" if path else leaf, buffer, isinstance(module, _NormBase) and module.training)
        for path, module in model.named_modules()
        for leaf, buffer in module._buffers.items()
        if buffer is not None
    ]
