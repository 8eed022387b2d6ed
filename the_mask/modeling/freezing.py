"""Choose which parameters train, and which modules are in eval mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


def freeze_except(model: nn.Module, trainable: Sequence[str]) -> None:
    """Freeze every parameter whose name contains none of ``trainable``; an empty list freezes nothing.

    Parameters that are frozen already stay so.

    Raises:
        ValueError: a substring that is in no parameter's name.
    """
    names = [name for name, _ in model.named_parameters()]
    for part in trainable:
        if not any(part in name for name in names):
            raise ValueError(
                f"MODEL.THE_MASK.TRAINABLE has {part!r}, which is in no parameter's name;"
                f" names start with {', '.join(sorted({name.split('.')[0] for name in names}))}"
            )
    if trainable:
        for name, parameter in model.named_parameters():
            if not any(part in name for part in trainable):
                parameter.requires_grad_(False)


def eval_frozen(module: nn.Module) -> None:
    """Put every module with parameters, none of which trains, in eval mode (dropout, drop path, batch norm)."""
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        module.eval()
        return
    for child in module.children():
        eval_frozen(child)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch a model to eval mode inside the block, and restore every module's mode afterwards.

    Calling ``model.train()`` afterwards would be wrong: it also switches modules that are frozen in eval mode.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
