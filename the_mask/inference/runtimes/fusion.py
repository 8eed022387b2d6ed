"""Folds frozen batch norms into the convolutions before them.

The module is run once to find the pairs: a norm follows a convolution if its input is the very tensor that the
convolution returned. If other layers also read that tensor, the convolution must not change; so the fused module is
compared with the original, and norms whose folding changes the result are not folded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
TOLERANCE = 1e-3


def fuse_norms(module: nn.Module, example: Sequence[Tensor]) -> nn.Module:
    """Fold all norms where that is possible, in place; the module must be in eval mode and on the CPU.

    Args:
        module: ``forward`` gives a sequence of tensors.
        example: arguments.
    """
    pairs = _pairs(module, example)
    if not pairs:
        return module
    with torch.no_grad():
        expected = module(*example)
        fused = copy.deepcopy(module)
        for conv, norm in pairs:
            _fold(fused.get_submodule(conv), fused, norm)
        found = fused(*example)
    return fused if all(_close(a, b) for a, b in zip(expected, found, strict=True)) else module


def _pairs(module: nn.Module, example: Sequence[Tensor]) -> list[tuple[str, str]]:
    """Names of convolutions and of the norms that read their result."""
    # Keep the tensors, so that no other tensor can reuse their address.
    results: dict[int, tuple[str, Tensor]] = {}
    pairs: list[tuple[str, str]] = []
    calls: dict[str, int] = {}
    hooks = []
    names = {child: name for name, child in module.named_modules()}

    def after_conv(conv: nn.Module, _: Any, result: Tensor) -> None:
        calls[names[conv]] = calls.get(names[conv], 0) + 1
        results[id(result)] = (names[conv], result)

    def before_norm(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        calls[names[norm]] = calls.get(names[norm], 0) + 1
        source = results.get(id(arguments[0]))
        if source is not None:
            pairs.append((source[0], names[norm]))

    for child in names:
        # A convolution with its norm inside (Detectron2's) returns the norm's output; only plain ones show their own.
        if isinstance(child, nn.Conv2d) and getattr(child, "norm", None) is None:
            hooks.append(child.register_forward_hook(after_conv))
        elif isinstance(child, NORMS):
            hooks.append(child.register_forward_pre_hook(before_norm))
    try:
        with torch.no_grad():
            module(*example)
    finally:
        for hook in hooks:
            hook.remove()
    own = [
        (name, f"{name}.norm" if name else "norm")
        for child, name in names.items()
        if isinstance(child, nn.Conv2d) and isinstance(getattr(child, "norm", None), NORMS)
    ]
    return own + [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1]


def _fold(conv: nn.Module, root: nn.Module, norm_name: str) -> None:
    norm: Any = root.get_submodule(norm_name)
    assert isinstance(conv, nn.Conv2d)
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    conv.weight, conv.bias = weight, bias
    parent, _, last = norm_name.rpartition(".")
    # timm's norms contain their activation and a dropout.
    rest = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    setattr(root.get_submodule(parent), last, nn.Sequential(*rest) if rest else nn.Identity())


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return bool((a == b).float().mean() > 1 - TOLERANCE)
    return float((a - b).abs().max()) <= TOLERANCE * (float(a.abs().max()) or 1.0)
