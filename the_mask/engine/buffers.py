"""Copies of a model's buffers from before an iteration, for a checkpoint of the last finished iteration."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class BufferCopies:
    """Keeps a copy of every buffer of a model, updated if the buffer has changed or may have changed.

    Torch counts the changes of tensors, except those that batch norm makes to its statistics.
    """

    def __init__(self) -> None:
        # By name: the buffer, its version counter, and the copy.
        self._copies: dict[str, tuple[Tensor, int, Tensor]] = {}

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Copy the buffers that have changed since the last call."""
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
        """Restore the copies made by :meth:`take`."""
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
    """Name, buffer, and whether it may change without its version counter."""
    return [
        (f"{path}.{leaf}" if path else leaf, buffer, isinstance(module, _NormBase) and module.training)
        for path, module in model.named_modules()
        for leaf, buffer in module._buffers.items()
        if buffer is not None
    ]
