"""Bad input of both operators: the same ValueError on every path, naming the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_cases import MAIN_PATHS, Path

from the_mask.ops import dcnv3, ms_deform_attn

LEVELS = [(4, 6), (2, 3)]


def msda_arguments() -> dict[str, Any]:
    return {
        "value": torch.randn(2, 30, 4, 8),
        "spatial_shapes": LEVELS,
        "level_start_index": [0, 24],
        "sampling_locations": torch.rand(2, 5, 4, 2, 3, 2),
        "attention_weights": torch.rand(2, 5, 4, 2, 3),
    }


def dcn_arguments() -> dict[str, Any]:
    return {
        "x": torch.randn(2, 5, 6, 8),
        "offset": torch.randn(2, 5, 6, 36),
        "mask": torch.rand(2, 5, 6, 18),
        "kernel_size": 3,
        "padding": 1,
        "groups": 2,
    }


BAD_MSDA = {
    "rank of value": ({"value": torch.randn(30, 4, 8)}, r"value has shape \(30, 4, 8\): expected 4 axes"),
    "rank of locations": ({"sampling_locations": torch.rand(2, 5, 4, 6, 2)}, "sampling_locations has shape"),
    "rank of weights": ({"attention_weights": torch.rand(2, 5, 4, 6)}, "attention_weights has shape"),
    "levels do not add up": ({"spatial_shapes": [(4, 6), (3, 3)], "level_start_index": None}, "value has shape.*33"),
    "level count": ({"spatial_shapes": [(5, 6)], "level_start_index": None}, "sampling_locations has shape.*levels"),
    "negative size": ({"spatial_shapes": [(-4, -6), (2, 3)]}, "spatial_shapes=.*positive"),
    "zero size": ({"spatial_shapes": torch.tensor([[4, 6], [0, 3]])}, "spatial_shapes=.*positive"),
    "no level": ({"spatial_shapes": []}, "spatial_shapes is empty"),
    "flat sizes": ({"spatial_shapes": [4, 6, 2, 3]}, "spatial_shapes="),
    "shape of sizes": ({"spatial_shapes": torch.tensor([4, 6])}, "spatial_shapes is a"),
    "type of sizes": ({"spatial_shapes": torch.tensor([[4.0, 6.0], [2.0, 3.0]])}, "spatial_shapes is a torch.float32"),
    "starts": ({"level_start_index": torch.tensor([0, 25])}, r"level_start_index=\[0, 25\]: expected \[0, 24\]"),
    "batch": ({"attention_weights": torch.rand(1, 5, 4, 2, 3)}, "attention_weights has shape.*batch"),
    "heads": ({"sampling_locations": torch.rand(2, 5, 2, 2, 3, 2)}, "sampling_locations has shape.*heads"),
    "queries": ({"attention_weights": torch.rand(2, 4, 4, 2, 3)}, "attention_weights has shape.*queries"),
    "points": ({"attention_weights": torch.rand(2, 5, 4, 2, 4)}, "attention_weights has shape.*points"),
    "coordinates": ({"sampling_locations": torch.rand(2, 5, 4, 2, 3, 3)}, "sampling_locations has shape.*x and y"),
    "float64 with float32": ({"value": torch.randn(2, 30, 4, 8).double()}, "sampling_locations has dtype.*float64"),
    "integers": ({"attention_weights": torch.ones(2, 5, 4, 2, 3, dtype=torch.int64)}, "attention_weights has dtype"),
    "device": ({"sampling_locations": torch.rand(2, 5, 4, 2, 3, 2, device="meta")}, "sampling_locations is on meta"),
}
BAD_DCN = {
    "rank of x": ({"x": torch.randn(5, 6, 8)}, "x has shape"),
    "empty image": ({"x": torch.randn(2, 0, 6, 8)}, "x has shape.*positive"),
    "rank of offset": ({"offset": torch.randn(2, 30, 36)}, "offset has shape"),
    "groups": ({"groups": 3}, "groups=3"),
    "no group": ({"groups": 0}, "groups=0"),
    "kernel": ({"kernel_size": (3, 0)}, "kernel_size="),
    "kernel length": ({"kernel_size": (3, 3, 3)}, "kernel_size="),
    "stride": ({"stride": 0}, "stride=0"),
    "padding": ({"padding": -1}, "padding=-1"),
    "dilation": ({"dilation": (1, 0)}, "dilation="),
    "kernel beyond image": ({"kernel_size": 9, "padding": 0}, "does not fit"),
    "points": ({"offset": torch.randn(2, 5, 6, 32)}, "offset has shape.*points"),
    "mask": ({"mask": torch.rand(2, 5, 6, 17)}, "mask has shape"),
    "size": ({"mask": torch.rand(2, 5, 5, 18)}, "mask has shape.*columns"),
    "batch": ({"offset": torch.randn(1, 5, 6, 36)}, "offset has shape.*batch"),
    "center": ({"remove_center": True, "kernel_size": (3, 1)}, "remove_center"),
    "share": ({"center_feature_scale": torch.rand(2, 5, 6, 3)}, "center_feature_scale has shape"),
    "share with stride": (
        {
            "stride": 2,
            "offset": torch.randn(2, 3, 3, 36),
            "mask": torch.rand(2, 3, 3, 18),
            "center_feature_scale": torch.rand(2, 5, 6, 2),
        },
        "center_feature_scale needs",
    ),
    "dtypes": ({"x": torch.randn(2, 5, 6, 8).double()}, "offset has dtype"),
    "integers": ({"x": torch.ones(2, 5, 6, 8, dtype=torch.int32)}, "x has dtype"),
    "device": ({"mask": torch.rand(2, 5, 6, 18, device="meta")}, "mask is on meta"),
}


@pytest.mark.parametrize("name", BAD_MSDA)
@pytest.mark.parametrize("path", MAIN_PATHS)
def test_ms_deform_attn_refuses(path: Path, name: str):
    change, message = BAD_MSDA[name]
    with path.running(), pytest.raises(ValueError, match=message):
        ms_deform_attn(**(msda_arguments() | change))


@pytest.mark.parametrize("name", BAD_DCN)
@pytest.mark.parametrize("path", MAIN_PATHS)
def test_dcnv3_refuses(path: Path, name: str):
    change, message = BAD_DCN[name]
    with path.running(), pytest.raises(ValueError, match=message):
        dcnv3(**(dcn_arguments() | change))


@pytest.mark.parametrize("path", MAIN_PATHS)
def test_good_arguments_pass(path: Path):
    """The base of the tables above is valid."""
    with path.running():
        assert ms_deform_attn(**msda_arguments()).shape == (2, 5, 32)
        assert dcnv3(**dcn_arguments()).shape == (2, 5, 6, 8)


def test_registered_operators_check_too():
    """Callers of torch.ops.the_mask do not get around the checks."""
    arguments = msda_arguments()
    value, locations, weights = (arguments[name] for name in ("value", "sampling_locations", "attention_weights"))
    with pytest.raises(ValueError, match="value has shape"):
        torch.ops.the_mask.ms_deform_attn(value, [4, 6, 3, 3], locations, weights)
    arguments = dcn_arguments()
    tensors = [arguments[name] for name in ("x", "offset", "mask")]
    with pytest.raises(ValueError, match="offset has shape"):
        torch.ops.the_mask.dcnv3(*tensors, None, [3, 3], [1, 1], [0, 0], [1, 1], 2, 1.0, False)


def test_private_operators_check_memory_safety():
    """The kernels themselves refuse what would make them read elsewhere."""
    with Path("compiled").running():
        kernels = torch.ops.the_mask_kernels
        value, locations, weights = torch.randn(1, 30, 2, 8), torch.rand(1, 5, 2, 2, 3, 2), torch.rand(1, 5, 2, 2, 3)
        for sizes, changed in (
            ([4, 6, 3, 3], weights),
            ([4, 6], weights),
            ([-4, -6, 2, 3], weights),
            ([4, 6, 2, 3], weights[:, :4].contiguous()),
            ([4, 6, 2, 3], weights.double()),
            ([4, 6, 2, 3], weights.transpose(3, 4)),
        ):
            with pytest.raises(RuntimeError):
                kernels.ms_deform_attn_forward(value, sizes, None, locations, changed)
        geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 2, 1.0, False)
        x, offset, mask = torch.randn(1, 5, 6, 8), torch.randn(1, 5, 6, 36), torch.rand(1, 5, 6, 18)
        for bad in ((x, offset[..., :30].contiguous(), mask), (x, offset, mask.half()), (x[:, :4], offset, mask)):
            with pytest.raises(RuntimeError):
                kernels.dcnv3_forward(*bad, None, *geometry)
        with pytest.raises(RuntimeError):
            kernels.dcnv3_backward(torch.randn(1, 4, 6, 8), x, offset, mask, None, *geometry, False)
