"""Multiply-adds against formulas, and against fvcore's tracer, which shares no code with the counter."""

import pytest
import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.nn import functional as F

from the_mask.modeling.macs import count_macs
from the_mask.ops import DCNv3, MSDeformAttn
from the_mask.ops.fast_linear import FastLinear


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_products_count_and_modes_are_kept(device):
    conv = nn.Conv2d(3, 8, 3, padding=1)
    module = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)).to(device).train()
    module[1].eval()
    conv.requires_grad_(False)
    x = torch.zeros(1, 3, 8, 8, device=device)
    assert count_macs(module, lambda: module(x)) == 8 * 8 * 8 * 27 + 512 * 5
    assert [child.training for child in module] == [True, False, True, True, True]
    assert [parameter.requires_grad for parameter in module[4].parameters()] == [True, True]
    assert not conv.weight.requires_grad


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operators_are_counted(device):
    with torch.device(device):
        attention = MSDeformAttn(32, 2, 4, 3)
        queries, tokens = torch.zeros(2, 11, 32), torch.zeros(2, 5 * 7 + 2 * 3, 32)
        reference = torch.zeros(2, 11, 2, 2)
        convolution, x = DCNv3(32, groups=4), torch.zeros(2, 6, 5, 32)
    samples = 2 * 11 * 4 * 2 * 3
    linear = 2 * 11 * 32 * (48 + 24 + 32) + 2 * 41 * 32 * 32
    found = count_macs(attention, lambda: attention(queries, reference, tokens, [(5, 7), (2, 3)]))
    assert found == linear + 5 * samples * 8
    positions = 2 * 6 * 5
    linear = positions * 32 * (4 * 18 + 4 * 9 + 32 + 32) + positions * 9 * 32
    assert count_macs(convolution, lambda: convolution(x)) == linear + 5 * positions * 9 * 32


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_and_fast_linears_are_counted(device):
    layer = FastLinear(6, 10).to(device)
    query, key = torch.zeros(2, 3, 5, 8, device=device), torch.zeros(2, 3, 7, 8, device=device)
    assert count_macs(layer, lambda: layer(torch.zeros(4, 6, device=device))) == 4 * 6 * 10
    products = 2 * (2 * 3) * 5 * 7 * 8
    assert count_macs(layer, lambda: F.scaled_dot_product_attention(query, key, key)) == products


def test_a_whole_network_counts_as_fvcore_counts_it():
    model, x = torchvision.models.resnet18().eval(), torch.zeros(1, 3, 64, 96)
    theirs = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).by_operator()
    assert count_macs(model, lambda: model(x)) == theirs["conv"] + theirs["linear"]
