"""ResNet-d8: equality with torchvision's dilated ResNet and with a naive network, strides, freezing."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from tolerances import assert_close
from torch import nn

from the_mask.config import load_config
from the_mask.modeling.backbones.resnet_d8 import block_dilations

LEVELS = ("res2", "res3", "res4", "res5")


def build(depth: int, *overrides: str) -> nn.Module:
    cfg = load_config(None, ["MODEL.RESNETS.DEPTH", str(depth), "MODEL.RESNETS.NORM", "BN", *overrides])
    return BACKBONE_REGISTRY.get("build_resnet_d8_backbone")(cfg, ShapeSpec(channels=3))


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(1 + torch.rand(value.shape, generator=generator))
        elif value.ndim == 1:
            value.add_(0.2 * torch.randn(value.shape, generator=generator))


def torchvision_twin(depth: int) -> nn.Module:
    """torchvision's ResNet of output stride 8, with the deep stem in place of its 7x7 convolution."""
    twin = getattr(torchvision.models, f"resnet{depth}")(replace_stride_with_dilation=[False, True, True])
    twin.conv1 = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
    )
    del twin.fc
    return twin


def to_torchvision(key: str) -> str:
    stem = {"conv1_1": ("conv1.0", "conv1.1"), "conv1_2": ("conv1.3", "conv1.4"), "conv1_3": ("conv1.6", "bn1")}
    parts = key.split(".")
    normed = parts[-2] == "norm"
    if parts[0] == "stem":
        return f"{stem[parts[1]][normed]}.{parts[-1]}"
    block = f"layer{int(parts[0][3:]) - 1}.{parts[1]}"
    if parts[2] == "shortcut":
        return f"{block}.downsample.{int(normed)}.{parts[-1]}"
    return f"{block}.{'bn' if normed else 'conv'}{parts[2][4:]}.{parts[-1]}"


def test_resnet50_equals_torchvision():
    model, twin = build(50).eval(), torchvision_twin(50).eval()
    randomize(model)
    twin.load_state_dict({to_torchvision(key): value for key, value in model.state_dict().items()})
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        features = model(x)
        y = twin.maxpool(twin.relu(twin.bn1(twin.conv1(x))))
        for i, level in enumerate(LEVELS, start=1):
            y = getattr(twin, f"layer{i}")(y)
            assert_close(features[level], y, "peer")


@pytest.mark.parametrize("depth", [101, 152])
def test_deeper_ones_have_torchvisions_parameters(depth):
    with torch.device("meta"):
        model, twin = build(depth), torchvision_twin(depth)
    ours = {to_torchvision(key): value.shape for key, value in model.state_dict().items()}
    assert ours == {key: value.shape for key, value in twin.state_dict().items()}
    # torchvision's modules know their dilations too.
    theirs = dict(twin.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            peer = theirs[to_torchvision(f"{name}.weight").removesuffix(".weight")]
            assert (module.dilation, module.stride, module.padding) == (peer.dilation, peer.stride, peer.padding), name


def naive_resnet18(p: dict[str, torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    def conv(name: str, x: torch.Tensor, stride: int = 1, dilation: int = 1) -> torch.Tensor:
        weight = p[f"{name}.weight"]
        y = F.conv2d(x, weight, stride=stride, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)
        stats = [p[f"{name}.norm.{leaf}"][:, None, None] for leaf in ("running_mean", "running_var", "weight", "bias")]
        return (y - stats[0]) / (stats[1] + 1e-5).sqrt() * stats[2] + stats[3]

    x = conv("stem.conv1_1", x, stride=2).relu()
    x = conv("stem.conv1_3", conv("stem.conv1_2", x).relu()).relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    outputs = []
    for level, stride, dilations in (
        ("res2", 1, (1, 1)),
        ("res3", 2, (1, 1)),
        ("res4", 1, (1, 2)),
        ("res5", 1, (2, 4)),
    ):
        for i, dilation in enumerate(dilations):
            block, own = f"{level}.{i}", stride if i == 0 else 1
            y = conv(f"{block}.conv2", conv(f"{block}.conv1", x, own, dilation).relu())
            skip = conv(f"{block}.shortcut", x, own) if f"{block}.shortcut.weight" in p else x
            x = (y + skip).relu()
        outputs.append(x)
    return outputs


def test_resnet18_equals_a_naive_network():
    model = build(18).double().eval()
    randomize(model)
    x = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    with torch.no_grad():
        expected, features = naive_resnet18(model.state_dict(), x), model(x)
    for level, want in zip(LEVELS, expected, strict=True):
        assert_close(features[level], want, "network")


@pytest.mark.parametrize(("depth", "width"), [(18, 64), (50, 256)])
def test_shapes(depth, width):
    model = build(depth)
    shapes = model.output_shape()
    assert [shapes[level].stride for level in LEVELS] == [4, 8, 8, 8]
    assert [shapes[level].channels for level in LEVELS] == [width, 2 * width, 4 * width, 8 * width]
    features = model.eval()(torch.randn(1, 3, 64, 96))
    assert [tuple(features[level].shape[2:]) for level in LEVELS] == [(16, 24), (8, 12), (8, 12), (8, 12)]


def test_dilations():
    assert block_dilations(1, 3) == [1, 1, 1]
    assert block_dilations(2, 3) == [1, 2, 2]
    assert block_dilations(4, 1) == [2]


def test_freeze_and_training():
    model = build(18, "MODEL.BACKBONE.FREEZE_AT", "1", "MODEL.RESNETS.NORM", "SyncBN").train()
    sum(f.mean() for f in model(torch.randn(2, 3, 64, 64)).values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("stem."), name
    # Without a process group SyncBN is plain BN; the frozen stem keeps its statistics.
    assert model.res2[0].conv1.norm.running_mean.abs().sum() > 0


def test_unknown_depth():
    with pytest.raises(ValueError, match=r"DEPTH=42: must be one of 18, 34, 50, 101, 152"):
        build(42)
