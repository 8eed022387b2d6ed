"""Multiply-adds of a forward pass: of convolutions, matrix products, attention and the project's operators.

Norms, activations and resizing are left out, as published figures leave them out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count

import the_mask.ops  # noqa: F401  (registers the operators)

# Four products for the bilinear sample and one for the weight: InternImage's count for DCNv3, used for both operators.
MACS_PER_SAMPLE = 5


def count_macs(module: nn.Module, run: Callable[[], Any]) -> int:
    """Multiply-adds of ``run()``, which calls the module, in eval mode and without gradients.

    The module may be on the meta device. Its modes are as before afterwards.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    modes = {child: child.training for child in module.modules()}
    counter = FlopCounterMode(display=False, custom_mapping=operator_flops())
    try:
        # The counter's tracking of modules requires parameters without gradients.
        for parameter in trained:
            parameter.requires_grad_(False)
        module.eval()
        with torch.no_grad(), counter:
            run()
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for child, training in modes.items():
            child.training = training
    return counter.get_total_flops() // 2


def operator_flops() -> dict[Any, Callable[..., int]]:
    """Counts (two per multiply-add) of what ``FlopCounterMode`` does not know: the project's and CPU operators."""

    def ms_deform_attn(value: Any, sizes: Any, locations: Any, *rest: Any, out_shape: Any = None, **kw: Any) -> int:
        # [N, Q, M, L, P, 2] samples of D channels each.
        return 2 * MACS_PER_SAMPLE * math.prod(locations[:-1]) * value[-1]

    def dcnv3(x: Any, offset: Any, mask: Any, scale: Any, *rest: Any, out_shape: Any = None, **kw: Any) -> int:
        # Weights [N, H, W, G*P]; the P samples of a group are of C / G channels.
        groups = rest[4]
        return 2 * MACS_PER_SAMPLE * math.prod(offset[:3]) * (mask[3] // groups) * x[3]

    def linear(x: Any, weight: Any, *rest: Any, out_shape: Any = None, **kw: Any) -> int:
        return 2 * math.prod(x) * weight[0]

    def convolution(x: Any, weight: Any, *rest: Any, out_shape: Any = None, **kw: Any) -> int:
        return conv_flop_count(x, weight, out_shape)

    def attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **kw: Any) -> int:
        return sdpa_flop_count(query, key, value)

    counts: dict[Any, Callable[..., int]] = {
        torch.ops.the_mask.ms_deform_attn: ms_deform_attn,
        torch.ops.the_mask.dcnv3: dcnv3,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten.mkldnn_convolution: convolution,
    }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        counts[torch.ops.mkldnn._linear_pointwise] = linear
    return counts
