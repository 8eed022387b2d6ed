"""Which parameters train, and keeping the modules of the others in eval mode."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def freeze_parameters(model: nn.Module, trainable: Sequence[str]) -> list[str]:
    """Leave trainable only the parameters whose name contains one of the given strings.

    Args:
        model: changed in place.
        trainable: substrings of parameter names; empty leaves the model as it is.

    Returns:
        Names of the parameters that were frozen here.

    Raises:
        ValueError: a string that matches no parameter.
    """
    if not trainable:
        return []
    names = [name for name, _ in model.named_parameters()]
    for pattern in trainable:
        if not any(pattern in name for name in names):
            raise ValueError(
                f"MODEL.THE_MASK.TRAINABLE {pattern!r} matches no parameter; top-level modules are "
                f"{', '.join(sorted({name.split('.')[0] for name in names}))}"
            )
    frozen = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(pattern in name for pattern in trainable):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def set_training_mode(model: nn.Module, frozen_eval: bool = True) -> None:
    """``model.train()``, then eval mode for every module whose parameters are all frozen (dropout, drop path, batch norm)."""
    model.train()
    if frozen_eval:
        _freeze_modes(model)


def _freeze_modes(module: nn.Module) -> None:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        _freeze_modes(child)
