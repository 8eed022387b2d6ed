"""SwiftNet-R18 and BiSeNet-R18: names and counts of the released models, sizes, and the ResNet against torchvision."""

from dataclasses import replace

import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from torch.nn import BatchNorm2d

import the_mask.modeling  # noqa: F401  (fills the registries)
from the_mask.config import load_config
from the_mask.data.clips import Clip
from the_mask.modeling.backbones.swiftnet_resnet18 import ResNet18
from the_mask.modeling.macs import count_macs
from the_mask.modeling.pixel.heads.swiftnet import SpatialPyramidPooling
from the_mask.modeling.propagation.official import bisenet_name, swiftnet_name

NORM = ("weight", "bias", "running_mean", "running_var")
SWIFTNET = {
    "MODEL.BACKBONE.NAME": "build_swiftnet_r18_backbone",
    "MODEL.SEM_SEG_HEAD.NAME": "SwiftNetHead",
}
BISENET = {
    "MODEL.BACKBONE.NAME": "build_bisenet_r18_backbone",
    "MODEL.SEM_SEG_HEAD.NAME": "BiSeNetHead",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": "['spatial', 'res4', 'res5']",
}


def build(parts, **changes):
    keys = {
        "MODEL.DEVICE": "cpu",
        "MODEL.META_ARCHITECTURE": "ClipSegmentor",
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.SEM_SEG_HEAD.NORM": "BN",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "19",
        **parts,
        **changes,
    }
    torch.manual_seed(0)
    return build_model(load_config(None, [word for pair in keys.items() for word in pair]))


def clip(height, width, classes=19):
    generator = torch.Generator().manual_seed(0)
    frame = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (height, width), generator=generator)
    return Clip([frame], [labels], video_id="v")


def resnet_names(prefix):
    names = {f"{prefix}conv1.weight", *(f"{prefix}bn1.{n}" for n in NORM)}
    for layer in range(1, 5):
        for block in range(2):
            here = f"{prefix}layer{layer}.{block}."
            for i in (1, 2):
                names |= {f"{here}conv{i}.weight", *(f"{here}bn{i}.{n}" for n in NORM)}
            if layer > 1 and block == 0:
                names |= {f"{here}downsample.0.weight", *(f"{here}downsample.1.{n}" for n in NORM)}
    return names


def names_of(model):
    return {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}


def test_swiftnet_has_the_released_names_and_count():
    model = build(SWIFTNET)
    released = resnet_names("backbone.")
    units = [f"backbone.spp.spp.{part}" for part in ("spp_bn", "spp0", "spp1", "spp2", "spp_fuse")]
    units += [f"backbone.upsample.{i}.{part}" for i in range(3) for part in ("bottleneck", "blend_conv")]
    for unit in (*units, "logits"):
        released |= {f"{unit}.conv.weight", *(f"{unit}.norm.{n}" for n in NORM)}
    released.add("logits.conv.bias")
    assert {swiftnet_name(name) for name in released} == names_of(model)
    assert sum(p.numel() for p in model.parameters()) == 11_797_071


def test_bisenet_has_the_released_names_and_count():
    model = build(BISENET)
    released = resnet_names("context_path.")
    with_norm = [f"spatial_path.{name}" for name in ("conv_7x7", "conv_3x3_1", "conv_3x3_2", "conv_1x1")]
    with_norm += [
        "global_context.1",
        "refines.0",
        "refines.1",
        "ffm.conv_1x1",
        *(f"heads.{i}.conv_3x3" for i in range(3)),
    ]
    with_norm += [f"arms.{i}.{part}" for i in range(2) for part in ("conv_3x3", "channel_attention.1")]
    for unit in with_norm:
        released |= {f"{unit}.conv.weight", *(f"{unit}.bn.{n}" for n in NORM)}
    released |= {f"ffm.channel_attention.{i}.conv.weight" for i in (1, 2)}
    released |= {f"heads.{i}.conv_1x1.{n}" for i in range(3) for n in ("weight", "bias")}
    assert {bisenet_name(name) for name in released} == names_of(model)
    total = sum(p.numel() for p in model.parameters())
    auxiliary = sum(p.numel() for head in model.sem_seg_head.heads[:2] for p in head.parameters())
    assert (total - auxiliary, total) == (12_894_163, 13_494_777)


@pytest.mark.parametrize(("parts", "published"), [(SWIFTNET, 58.3), (BISENET, 58.3)], ids=["swiftnet", "bisenet"])
def test_operations_at_three_quarters_of_cityscapes(parts, published):
    """Spec: 58.3 G at 0.75 for both (published for SwiftNet 58.5, for BiSeNet 58.0). Counted at 1/8 of each side."""
    model = build(parts)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = model.backbone, model.sem_seg_head

        def forward(self, x):
            return self.head(self.backbone(x)).logits

    logits = Logits()
    small = count_macs(logits, lambda: logits(torch.zeros(1, 3, 96, 192)))
    smaller = count_macs(logits, lambda: logits(torch.zeros(1, 3, 96, 96)))
    # Pooled branches do not grow with the picture; two sizes separate what does.
    per_pixel = (small - smaller) / (96 * 96)
    assert per_pixel * 768 * 1536 / 1e9 == pytest.approx(published, abs=0.1)


def test_resnet_equals_torchvision():
    ours, theirs = ResNet18().eval(), torchvision.models.resnet18().eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing
    assert unexpected == ["fc.weight", "fc.bias"]
    x = torch.randn(2, 3, 50, 70)
    y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    features = ours(x)
    for level in range(1, 5):
        y = getattr(theirs, f"layer{level}")(y)
        torch.testing.assert_close(features[f"res{level + 1}"], y)
    before = ResNet18(pre_relu=True).eval()
    before.load_state_dict(ours.state_dict())
    for name, value in before(x).items():
        assert value.min() < 0
        torch.testing.assert_close(value.relu(), features[name])


@pytest.mark.parametrize("pre_relu", [False, True])
def test_swiftnet_decodes_the_maps_of_torchvision(pre_relu):
    """The released blocks apply their ReLU in place, so that skips and pooling see the maps after it."""
    model = build(SWIFTNET, **{"MODEL.SWIFTNET.PRE_RELU": str(pre_relu)}).eval()
    theirs = torchvision.models.resnet18().eval()
    theirs.load_state_dict(model.backbone.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 96)
    y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    features = {}
    for level in range(1, 5):
        stage = getattr(theirs, f"layer{level}")
        first, last = stage[0](y), stage[1]
        y = last(first)
        before = last.bn2(last.conv2(last.relu(last.bn1(last.conv1(first))))) + first
        features[f"res{level + 1}"] = before if pre_relu else y
    torch.testing.assert_close(model.sem_seg_head(model.backbone(x)).logits, model.sem_seg_head(features).logits)


def test_momentum_of_swiftnets_norms():
    momenta = {
        name: module.momentum for name, module in build(SWIFTNET).named_modules() if isinstance(module, BatchNorm2d)
    }
    assert {value for name, value in momenta.items() if ".spp." in name} == {0.005}
    assert {value for name, value in momenta.items() if ".spp." not in name} == {0.1}


@pytest.mark.parametrize("parts", [SWIFTNET, BISENET], ids=["swiftnet", "bisenet"])
@pytest.mark.parametrize("size", [(64, 96), (50, 71)])
def test_train_and_predict_at_any_size(parts, size):
    model = build(parts)
    losses = model.train()([clip(*size), replace(clip(*size), seed=1)])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert len(losses) == (3 if parts is BISENET else 1)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    (scores,) = model.eval().score_maps([clip(*size)])
    stride = 8 if parts is BISENET else 4
    assert model.score_stride == stride
    assert scores.shape == (1, 19, -(-size[0] // stride), -(-size[1] // stride))
    torch.testing.assert_close(scores.sum(dim=1), torch.ones_like(scores[:, 0]))


def test_pyramid_pooling_keeps_cells_square():
    pooling = SpatialPyramidPooling(16, "BN").eval()
    sizes = []
    for number in range(3):
        pooling.spp[f"spp{number}"].register_forward_hook(lambda _m, x, _y: sizes.append(tuple(x[0].shape[-2:])))
    assert pooling(torch.randn(1, 16, 12, 24)).shape == (1, 128, 12, 24)
    assert sizes == [(8, 16), (4, 8), (2, 4)]


@pytest.mark.parametrize(
    ("parts", "changes", "message"),
    [
        (SWIFTNET, {"MODEL.SEM_SEG_HEAD.IN_FEATURES": "['res5']"}, "needs two levels"),
        (SWIFTNET, {"MODEL.SEM_SEG_HEAD.IN_FEATURES": "['res2', 'res9']"}, "the backbone has res2"),
        (SWIFTNET, {"MODEL.RESNETS.NORM": ""}, "empty norm"),
        (BISENET, {"MODEL.SEM_SEG_HEAD.IN_FEATURES": "['res4', 'res5']"}, "takes three levels"),
        (BISENET, {"MODEL.SEM_SEG_HEAD.IN_FEATURES": "['res2', 'res4', 'res5']"}, "res2 has 64 channels"),
    ],
)
def test_bad_configs(parts, changes, message):
    with pytest.raises(ValueError, match=message):
        build(parts, **changes)
