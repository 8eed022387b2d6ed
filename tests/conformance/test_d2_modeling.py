"""Documented behaviour of detectron2.modeling: registries, builders, and ResNet against torchvision's."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torchvision
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    Backbone,
    build_backbone,
    build_model,
    build_sem_seg_head,
)
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from tolerances import assert_close
from torch import Tensor, nn

STAGES = ["stem", "res2", "res3", "res4", "res5"]


def resnet_cfg(**keys: object) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.OUT_FEATURES = STAGES
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    for key, value in keys.items():
        node = cfg.MODEL.BACKBONE if key == "FREEZE_AT" else cfg.MODEL.RESNETS
        node[key] = value
    if cfg.MODEL.RESNETS.DEPTH < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    return cfg


def torchvision_key(key: str) -> str:
    """Return torchvision's name of a Detectron2 ResNet tensor."""
    key = key.replace("stem.conv1.norm.", "bn1.").replace("stem.", "")
    key = re.sub(r"^res(\d)", lambda m: f"layer{int(m[1]) - 1}", key)
    key = key.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
    return re.sub(r"conv(\d)\.norm\.", r"bn\1.", key)


@pytest.mark.parametrize(
    ("depth", "dilation", "reference"),
    [
        (18, 1, torchvision.models.resnet18),
        (50, 1, torchvision.models.resnet50),
        (
            50,
            2,
            lambda: torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True]),
        ),
    ],
)
def test_resnet_equals_torchvision(depth: int, dilation: int, reference: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build_backbone(resnet_cfg(DEPTH=depth, RES5_DILATION=dilation)).eval()
    theirs = reference().eval()
    for name, tensor in theirs.named_buffers():
        if "running" in name:
            tensor.uniform_(0.5, 1.5)
    state = theirs.state_dict()
    # The same tensors under other names, none too many and none missing but the classifier.
    renamed = {key: state.pop(torchvision_key(key)) for key in model.state_dict()}
    assert sorted(state) == ["fc.bias", "fc.weight"]
    model.load_state_dict(renamed)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = model(x)
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        torch.testing.assert_close(features["stem"], y)
        for number in range(1, 5):
            y = getattr(theirs, f"layer{number}")(y)
            if dilation == 2 and number == 4:
                # torchvision dilates the first block of a stage by the rate before it, Detectron2 by the new one.
                assert features["res5"].shape == y.shape
            else:
                assert_close(features[f"res{number + 1}"], y, "peer")


def test_resnet_names_and_shapes() -> None:
    model = build_backbone(resnet_cfg(NORM="FrozenBN", FREEZE_AT=2))
    assert isinstance(model, Backbone)
    keys = list(model.state_dict())
    assert keys[:5] == [
        "stem.conv1.weight",
        *(f"stem.conv1.norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
    ]
    assert keys[5] == "res2.0.shortcut.weight"
    assert "res5.2.conv3.norm.running_var" in keys
    assert len(keys) == 265
    assert model.output_shape() == {
        "stem": ShapeSpec(channels=64, stride=4),
        "res2": ShapeSpec(channels=256, stride=4),
        "res3": ShapeSpec(channels=512, stride=8),
        "res4": ShapeSpec(channels=1024, stride=16),
        "res5": ShapeSpec(channels=2048, stride=32),
    }
    assert model.size_divisibility == 0
    assert model.padding_constraints == {}


def test_stages_behind_the_last_output_are_not_built() -> None:
    model = build_backbone(resnet_cfg(DEPTH=18, OUT_FEATURES=["res3"]))
    assert not hasattr(model, "res4")
    assert list(model(torch.zeros(1, 3, 32, 32))) == ["res3"]


def test_stride_in_1x1() -> None:
    for in_1x1, strides in ((True, ((2, 2), (1, 1))), (False, ((1, 1), (2, 2)))):
        block = BottleneckBlock(8, 16, bottleneck_channels=4, stride=2, stride_in_1x1=in_1x1)
        assert (block.conv1.stride, block.conv2.stride) == strides


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 3, 5])
def test_freeze_at(freeze_at: int) -> None:
    model = build_backbone(resnet_cfg(DEPTH=18, FREEZE_AT=freeze_at))
    for number, name in enumerate(STAGES, start=1):
        part = getattr(model, name)
        frozen = number <= freeze_at
        assert all(p.requires_grad != frozen for p in part.parameters()), name
        assert any(isinstance(m, FrozenBatchNorm2d) for m in part.modules()) == frozen, name


def test_seeded_weights_follow_he_initialisation_in_order_of_construction() -> None:
    """Both runtimes must draw alike: golden losses depend on it."""
    torch.manual_seed(0)
    block = BasicBlock(4, 8, stride=2)
    torch.manual_seed(0)
    # The constructors of the three convolutions draw first, in this order; then the He draws.
    drawn = [nn.Conv2d(*shape, bias=False) for shape in ((4, 8, 1), (4, 8, 3), (8, 8, 3))]
    for conv, layer in ((drawn[1], block.conv1), (drawn[2], block.conv2), (drawn[0], block.shortcut)):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        assert layer.weight.equal(conv.weight)


def test_make_stage_and_classifier() -> None:
    blocks = ResNet.make_stage(
        BottleneckBlock, 3, in_channels=4, out_channels=8, bottleneck_channels=4,
        stride_per_block=[2, 1, 1], dilation_per_block=[1, 1, 2],
    )  # fmt: skip
    assert [(b.stride, b.conv2.dilation) for b in blocks] == [(2, (1, 1)), (1, (1, 1)), (1, (2, 2))]
    with pytest.raises(AssertionError):
        ResNet.make_stage(BasicBlock, 3, in_channels=4, out_channels=8, stride_per_block=[2, 1])
    model = ResNet(BasicStem(), ResNet.make_default_stages(18), num_classes=5)
    assert model(torch.zeros(2, 3, 32, 32))["linear"].shape == (2, 5)
    with pytest.raises(AssertionError):
        ResNet(BasicStem(), ResNet.make_default_stages(18), out_features=["res9"])
    with pytest.raises(AssertionError):
        model(torch.zeros(3, 32, 32))


@pytest.mark.parametrize(
    "keys", [{"DEPTH": 18, "RES5_DILATION": 2}, {"DEPTH": 18, "NUM_GROUPS": 2}, {"RES5_DILATION": 3}]
)
def test_unsupported_resnets(keys: dict[str, int]) -> None:
    with pytest.raises(AssertionError):
        build_backbone(resnet_cfg(**keys))


class _ConformanceBackbone(Backbone):
    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec) -> None:
        super().__init__()
        self._out_features = ["a"]
        self._out_feature_channels = {"a": input_shape.channels}
        self._out_feature_strides = {"a": 2}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": x}


@BACKBONE_REGISTRY.register()
def _conformance_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    return _ConformanceBackbone(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def _conformance_not_a_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    return nn.Identity()


@META_ARCH_REGISTRY.register()
class _ConformanceModel(nn.Module):
    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


@SEM_SEG_HEADS_REGISTRY.register()
def _conformance_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> tuple[str, dict[str, ShapeSpec]]:
    return "head", input_shape


def test_builders() -> None:
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "_conformance_backbone"
    cfg.MODEL.PIXEL_MEAN = [1.0, 2.0]
    backbone = build_backbone(cfg)
    assert backbone.output_shape() == {"a": ShapeSpec(channels=2, stride=2)}  # as many channels as PIXEL_MEAN
    assert build_backbone(cfg, ShapeSpec(channels=5)).output_shape()["a"].channels == 5
    cfg.MODEL.BACKBONE.NAME = "_conformance_not_a_backbone"
    with pytest.raises(AssertionError):
        build_backbone(cfg)
    cfg.MODEL.BACKBONE.NAME = "_conformance_nothing"
    with pytest.raises(KeyError, match="_conformance_nothing"):
        build_backbone(cfg)

    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "_ConformanceModel", "meta"
    assert build_model(cfg).weight.device.type == "meta"
    cfg.MODEL.SEM_SEG_HEAD.NAME = "_conformance_head"
    assert build_sem_seg_head(cfg, {"a": ShapeSpec(1)}) == ("head", {"a": ShapeSpec(1)})


def test_backbone_is_abstract() -> None:
    with pytest.raises(TypeError):
        Backbone()
