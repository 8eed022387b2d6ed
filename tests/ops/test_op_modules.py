"""The layers MSDeformAttn and DCNv3: published names and start values, shapes, precision under autocast."""

from __future__ import annotations

import math

import pytest
import torch
from ops_cases import MAIN_PATHS, Path
from tolerances import assert_close
from torch import Tensor

from the_mask.ops import DCNv3, MSDeformAttn, dcnv3, ms_deform_attn

LEVELS = [(4, 6), (2, 3)]


def msda_arguments(device: str = "cpu", last: int = 2) -> tuple[MSDeformAttn, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = MSDeformAttn(32, 2, 4, 3).to(device)
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.1)
    torch.nn.init.normal_(layer.attention_weights.weight)
    query = torch.randn(2, 7, 32, device=device)
    references = torch.rand(2, 7, 2, last, device=device)
    return layer, query, references, torch.randn(2, 30, 32, device=device)


def test_msda_names_and_start():
    layer = MSDeformAttn(256, 3, 8, 4)
    names = [
        f"{part}.{kind}"
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
        for kind in ("weight", "bias")
    ]
    assert list(layer.state_dict()) == names
    assert float(layer.sampling_offsets.weight.detach().abs().max()) == 0
    bias = layer.sampling_offsets.bias.view(8, 3, 4, 2)
    compass = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, direction in enumerate(compass):
        for point in range(4):
            expected = torch.tensor(direction, dtype=torch.float32) * (point + 1)
            assert_close(bias[head, 1, point].detach(), expected, "sample")
    bound = math.sqrt(6 / 512)
    assert 0.9 * bound < float(layer.value_proj.weight.detach().abs().max()) <= bound
    assert float(layer.output_proj.bias.detach().abs().max()) == 0


def test_msda_equals_definition():
    layer, query, references, source = msda_arguments()
    offsets = layer.sampling_offsets(query).view(2, 7, 4, 2, 3, 2)
    weights = layer.attention_weights(query).view(2, 7, 4, 6).softmax(-1).view(2, 7, 4, 2, 3)
    extent = torch.tensor([[6.0, 4.0], [3.0, 2.0]])
    locations = references[:, :, None, :, None] + offsets / extent[None, None, None, :, None]
    padding = torch.zeros(2, 30, dtype=torch.bool)
    padding[1, 3:9] = True
    value = layer.value_proj(source) * (~padding)[..., None]
    expected = layer.output_proj(ms_deform_attn(value.view(2, 30, 4, 8), LEVELS, None, locations, weights))
    torch.testing.assert_close(layer(query, references, source, LEVELS, None, padding), expected)
    # Shapes as tensors, as published callers hand them over.
    shapes, starts = torch.tensor(LEVELS), torch.tensor([0, 24])
    torch.testing.assert_close(layer(query, references, source, shapes, starts, padding), expected)


def test_msda_box_references():
    layer, query, references, source = msda_arguments(last=4)
    offsets = layer.sampling_offsets(query).view(2, 7, 4, 2, 3, 2)
    weights = layer.attention_weights(query).view(2, 7, 4, 6).softmax(-1).view(2, 7, 4, 2, 3)
    boxes = references[:, :, None, :, None]
    locations = boxes[..., :2] + offsets / 3 * boxes[..., 2:] * 0.5
    value = layer.value_proj(source).view(2, 30, 4, 8)
    expected = layer.output_proj(ms_deform_attn(value, LEVELS, None, locations, weights))
    torch.testing.assert_close(layer(query, references, source, LEVELS), expected)


def test_bad_module_arguments():
    with pytest.raises(ValueError, match="embed_dim=30"):
        MSDeformAttn(30, 2, 4)
    layer, query, _, source = msda_arguments()
    with pytest.raises(ValueError, match="reference_points"):
        layer(query, torch.rand(2, 7, 2, 3), source, LEVELS)
    with pytest.raises(ValueError, match="channels=30"):
        DCNv3(30, 4)
    with pytest.raises(ValueError, match="kernel_size=4"):
        DCNv3(32, 4, kernel_size=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", MAIN_PATHS)
def test_half_precision_layers(path: Path, dtype: torch.dtype):
    """Under autocast and with half parameters: a result near float32's, gradients for all parameters."""
    with path.running():
        layer, query, references, source = msda_arguments(path.device)
        image = torch.randn(2, 6, 5, 32, device=path.device)
        dcn = DCNv3(32, 4, dw_kernel_size=5, center_feature_scale=True).to(path.device)
        torch.nn.init.normal_(dcn.offset.weight, std=0.3)
        expected = (layer(query, references, source, LEVELS), dcn(image))
        with torch.autocast(path.device, dtype):
            found = (layer(query, references, source, LEVELS), dcn(image))
        for mine, wanted in zip(found, expected):
            assert mine.dtype == dtype
            assert_close(mine, wanted, "layer")
        (found[0].sum() + found[1].sum()).backward()
        assert all(parameter.grad is not None for module in (layer, dcn) for parameter in module.parameters())
        layer, dcn = layer.to(dtype), dcn.to(dtype)
        found = (layer(query.to(dtype), references, source.to(dtype), LEVELS), dcn(image.to(dtype)))
        for mine, wanted in zip(found, expected):
            assert mine.dtype == dtype
            assert_close(mine, wanted, "half inputs")


def test_autocast_keeps_offsets_in_float32():
    """A far offset in bfloat16 would be off by a 16th of a pixel."""
    layer = MSDeformAttn(8, 1, 1, 1)
    with torch.no_grad():
        layer.sampling_offsets.bias.copy_(torch.tensor([10.03, 0.0]))
        for projection in (layer.value_proj, layer.output_proj):
            projection.weight.copy_(torch.eye(8))
    source = torch.arange(32.0)[None, :, None].expand(1, 32, 8)  # the value is the column
    references = torch.tensor([4.5 / 32, 0.5]).view(1, 1, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        locations_seen = layer(torch.zeros(1, 1, 8), references, source, [(1, 32)])
    assert abs(float(locations_seen[0, 0, 0]) - 14.03) < 0.05  # 14.03 is 14 in bfloat16, 14.06 would be 14.0625


def test_dcn_names_and_start():
    parts = ("dw_conv.0", "dw_conv.1.1", "offset", "mask", "input_proj", "output_proj")
    names = [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    names += ["center_feature_scale_proj_weight", "center_feature_scale_proj_bias"]
    layer = DCNv3(32, 4, dw_kernel_size=5, center_feature_scale=True)
    assert sorted(layer.state_dict()) == sorted(names)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes["dw_conv.0.weight"] == (32, 1, 5, 5)
    assert shapes["offset.weight"] == (72, 32)
    assert shapes["mask.weight"] == (36, 32)
    assert shapes["center_feature_scale_proj_weight"] == (4, 32)
    assert layer.dw_conv[1][1].eps == 1e-6
    for name in ("offset.weight", "offset.bias", "mask.weight", "mask.bias", "center_feature_scale_proj_weight"):
        assert float(layer.state_dict()[name].abs().max()) == 0


@pytest.mark.parametrize("remove_center", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_dcn_equals_definition(center: bool, remove_center: bool):
    torch.manual_seed(0)
    layer = DCNv3(24, 3, dilation=2, offset_scale=0.5, center_feature_scale=center, remove_center=remove_center)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 5, 7, 24)
    projected = layer.input_proj(x)
    u = torch.nn.functional.conv2d(
        x.permute(0, 3, 1, 2), layer.dw_conv[0].weight, layer.dw_conv[0].bias, padding=1, groups=24
    ).permute(0, 2, 3, 1)
    u = torch.nn.functional.layer_norm(u, (24,), layer.dw_conv[1][1].weight, layer.dw_conv[1][1].bias, 1e-6)
    u = 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))
    points = 8 if remove_center else 9
    mask = layer.mask(u).view(2, 5, 7, 3, points).softmax(-1).flatten(3)
    sampled = dcnv3(projected, layer.offset(u), mask, 3, 1, 2, 2, 3, 0.5, remove_center=remove_center)
    if center:
        share = u @ layer.center_feature_scale_proj_weight.T + layer.center_feature_scale_proj_bias
        share = share.sigmoid().repeat_interleave(8, dim=-1)
        sampled = sampled * (1 - share) + projected * share
    assert_close(layer(x), layer.output_proj(sampled), "peer")
