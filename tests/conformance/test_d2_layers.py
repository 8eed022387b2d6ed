"""Documented behaviour of detectron2.layers and detectron2.structures."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import (
    CNNBlockBase,
    Conv2d,
    FrozenBatchNorm2d,
    NaiveSyncBatchNorm,
    ShapeSpec,
    cat,
    get_norm,
)
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList
from tolerances import assert_close
from torch import nn
from torch.nn import functional as F


def random_frozen(channels: int, eps: float = 1e-3) -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(channels, eps=eps)
    for name in ("weight", "bias", "running_mean"):
        getattr(norm, name).normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


@pytest.mark.parametrize("requires_grad", [False, True])
def test_frozen_batchnorm_values(requires_grad: bool) -> None:
    norm = random_frozen(4).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=requires_grad)
    column = (1, -1, 1, 1)
    expected = (x - norm.running_mean.view(column)) / (norm.running_var.view(column) + 1e-3).sqrt()
    expected = expected * norm.weight.view(column) + norm.bias.view(column)
    torch.testing.assert_close(norm(x), expected)
    if requires_grad:
        (grad,) = torch.autograd.grad(norm(x).pow(2).sum(), x)
        (wanted,) = torch.autograd.grad(expected.pow(2).sum(), x)
        torch.testing.assert_close(grad, wanted)


def test_frozen_batchnorm_has_buffers_only_and_starts_as_identity() -> None:
    norm = FrozenBatchNorm2d(4)
    assert not list(norm.parameters())
    assert list(norm.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    assert norm.num_batches_tracked is None
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(norm(x), x)
    assert_close(norm.running_var, torch.full((4,), 1 - 1e-5), "rounding")
    assert norm.train()(x).equal(norm.eval()(x))


def test_frozen_batchnorm_loads_old_and_batchnorm_states() -> None:
    trained = nn.BatchNorm2d(3)
    trained.running_mean.normal_()
    state = trained.state_dict()
    del state["num_batches_tracked"]
    norm = FrozenBatchNorm2d(3)
    norm.load_state_dict(state)
    assert norm.running_mean.equal(trained.running_mean)
    # A state without metadata counts as version 1, which had no statistics.
    norm.load_state_dict({"weight": torch.full((3,), 2.0), "bias": torch.ones(3)})
    assert norm.running_mean.equal(torch.zeros(3))
    assert norm.running_var.equal(torch.ones(3))


def test_convert_frozen_batchnorm() -> None:
    module = nn.Sequential(
        nn.BatchNorm2d(3, eps=1e-4), nn.Sequential(nn.SyncBatchNorm(3), nn.ReLU()), nn.GroupNorm(1, 3)
    )
    module[0].running_mean.fill_(3)
    module[0].weight.data.fill_(2)
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(module)
    assert frozen is module
    assert [type(m).__name__ for m in (frozen[0], frozen[1][0], frozen[2])] == [
        "FrozenBatchNorm2d",
        "FrozenBatchNorm2d",
        "GroupNorm",
    ]
    assert (frozen[0].running_mean[0], frozen[0].weight[0], frozen[0].eps) == (3, 2, 1e-4)
    assert isinstance(FrozenBatchNorm2d.convert_frozen_batchnorm(nn.BatchNorm2d(2)), FrozenBatchNorm2d)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("BN", nn.BatchNorm2d),
        ("SyncBN", nn.SyncBatchNorm),
        ("nnSyncBN", nn.SyncBatchNorm),
        ("naiveSyncBN", NaiveSyncBatchNorm),
        ("naiveSyncBN_N", NaiveSyncBatchNorm),
        ("FrozenBN", FrozenBatchNorm2d),
        ("GN", nn.GroupNorm),
    ],
)
def test_get_norm_by_name(name: str, kind: type[nn.Module]) -> None:
    assert isinstance(get_norm(name, 64), kind)


def test_get_norm_other_ways() -> None:
    assert get_norm("", 64) is None
    assert get_norm(None, 64) is None
    assert get_norm("GN", 64).num_groups == 32
    assert isinstance(get_norm(lambda channels: nn.InstanceNorm2d(channels), 7), nn.InstanceNorm2d)
    with pytest.raises(KeyError):
        get_norm("NoNorm", 64)
    x = torch.randn(2, 6, 3, 4)
    expected = F.layer_norm(x.permute(0, 2, 3, 1), (6,), eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(get_norm("LN", 6)(x), expected)


def test_naive_sync_batchnorm_alone_is_batchnorm() -> None:
    x = torch.randn(4, 3, 5, 5)
    ours, plain = NaiveSyncBatchNorm(3), nn.BatchNorm2d(3)
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours.running_var, plain.running_var)


def test_conv2d_applies_norm_then_activation() -> None:
    conv = Conv2d(3, 4, 3, padding=1, stride=2, bias=False, norm=nn.BatchNorm2d(4), activation=F.relu).eval()
    conv.norm.running_mean.fill_(0.3)
    x = torch.randn(2, 3, 6, 6)
    expected = F.relu(conv.norm(F.conv2d(x, conv.weight, stride=2, padding=1)))
    torch.testing.assert_close(conv(x), expected)
    assert "norm.weight" in conv.state_dict()
    assert list(Conv2d(3, 4, 1).state_dict()) == ["weight", "bias"]


def test_block_freeze() -> None:
    class Block(CNNBlockBase):
        def __init__(self) -> None:
            super().__init__(3, 4, 2)
            self.conv = Conv2d(3, 4, 1, norm=nn.BatchNorm2d(4))

    block = Block()
    assert (block.in_channels, block.out_channels, block.stride) == (3, 4, 2)
    assert block.freeze() is block
    assert not any(p.requires_grad for p in block.parameters())
    assert isinstance(block.conv.norm, FrozenBatchNorm2d)


def test_shape_spec_and_cat() -> None:
    assert ShapeSpec(3) == ShapeSpec(channels=3, height=None, width=None, stride=None)
    assert ShapeSpec(3, stride=4) != ShapeSpec(3)
    x = torch.ones(2)
    assert cat([x]) is x
    assert cat([x, x]).shape == (4,)


@pytest.mark.parametrize(
    ("kwargs", "size"),
    [
        ({}, (6, 7)),
        ({"size_divisibility": 4}, (8, 8)),
        ({"size_divisibility": 1}, (6, 7)),
        ({"padding_constraints": {"square_size": 16}}, (16, 16)),
        ({"size_divisibility": 5, "padding_constraints": {"size_divisibility": 3}}, (6, 9)),
    ],
)
def test_image_list(kwargs: dict, size: tuple[int, int]) -> None:
    images = [torch.rand(3, 5, 7), torch.rand(3, 6, 4)]
    batch = ImageList.from_tensors(images, pad_value=2.5, **kwargs)
    assert batch.tensor.shape == (2, 3, *size)
    assert [tuple(s) for s in batch.image_sizes] == [(5, 7), (6, 4)]
    assert len(batch) == 2
    for index, image in enumerate(images):
        assert batch[index].equal(image)
    assert batch.tensor[0, :, 5:].eq(2.5).all()
    assert batch.tensor[1, :, :, 4:].eq(2.5).all()
    moved = batch.to(torch.float64)
    assert moved.tensor.dtype == torch.float64
    assert moved.device.type == "cpu"


def test_image_list_of_one_and_bad_input() -> None:
    single = ImageList.from_tensors([torch.rand(5, 7)], size_divisibility=4)
    assert single.tensor.shape == (1, 8, 8)
    with pytest.raises(AssertionError):
        ImageList.from_tensors([])
    with pytest.raises(AssertionError):
        ImageList.from_tensors([torch.rand(3, 5, 7), torch.rand(5, 7)])


def test_sem_seg_postprocess_crops_then_resizes() -> None:
    scores = torch.rand(4, 8, 9)
    expected = F.interpolate(scores[None, :, :6, :7], size=(11, 13), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(sem_seg_postprocess(scores, (6, 7), 11, 13), expected)
