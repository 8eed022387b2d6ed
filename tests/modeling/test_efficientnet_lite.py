"""EfficientNet-Lite without timm: keys, results and gradients are timm's; what else timm can do is left to it."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

from the_mask.config import load_config
from the_mask.modeling.backbones.efficientnet_lite import EfficientNetLite, is_lite
from the_mask.modeling.backbones.timm_adapter import TimmBackbone

NAMES = [f"efficientnet_lite{i}" for i in (0, 3)] + [f"tf_efficientnet_lite{i}" for i in (0, 1, 2, 4)]


def build(name: str, *overrides: str) -> torch.nn.Module:
    cfg = load_config(None, ["MODEL.TIMM.NAME", name, *overrides])
    return BACKBONE_REGISTRY.get("build_timm_backbone")(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize("name", NAMES)
def test_equals_timm(name):
    torch.manual_seed(0)
    theirs, ours = TimmBackbone(name).eval(), build(name).eval()
    assert type(ours) is EfficientNetLite
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    state = theirs.state_dict()
    assert list(state) == list(ours.state_dict())
    ours.load_state_dict(state)
    assert theirs.output_shape() == ours.output_shape()
    for size in ((64, 96), (75, 101)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected, found = theirs(x), ours(x)
        assert list(expected) == list(found)
        for level in expected:
            torch.testing.assert_close(found[level], expected[level], rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_equal_timms(autocast):
    torch.manual_seed(0)
    theirs, ours = TimmBackbone("tf_efficientnet_lite0"), build("tf_efficientnet_lite0")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for model in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sum(feature.float().square().mean() for feature in model(x).values()).backward()
    ours_by_name = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours_by_name[name].grad, parameter.grad, rtol=0, atol=0, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(theirs.buffers(), ours.buffers(), strict=True))


def test_weights_start_as_timms_do():
    theirs, ours = TimmBackbone("efficientnet_lite0").state_dict(), build("efficientnet_lite0").state_dict()
    for name, value in ours.items():
        if name.endswith("weight") and value.dim() == 4 and value.numel() > 5000:
            assert 0.9 < float(value.std() / theirs[name].std()) < 1.1, name


@pytest.mark.parametrize(
    "overrides",
    [("MODEL.TIMM.NORM", "FrozenBN"), ("MODEL.TIMM.DROP_PATH", "0.1"), ("MODEL.TIMM.OUT_INDICES", "[1, 2, 3, 4]")],
)
def test_other_options_are_timms(overrides):
    assert type(build("tf_efficientnet_lite0", *overrides)) is TimmBackbone


def test_names():
    assert all(is_lite(name) for name in NAMES)
    others = ("lite0", "efficientnet_b0", "efficientnet_lite5", "efficientnet_lite0.in1k", "resnet18")
    assert not any(map(is_lite, others))
