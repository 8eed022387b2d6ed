"""FCN and UPerNet heads against plain torch, mmseg's key names, and every backbone under both kinds of heads."""

from dataclasses import replace

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from torch.nn import functional as F

import the_mask.modeling  # noqa: F401  (fills the registries)
from the_mask.config import load_config
from the_mask.config.keys.context import PixelHeadOptions
from the_mask.data.clips import Clip
from the_mask.modeling.pixel.heads import FCNHead, UperNetHead

SHAPES = {"res2": ShapeSpec(channels=4, stride=4), "res3": ShapeSpec(channels=6, stride=8)}
SHAPES["res4"] = ShapeSpec(channels=8, stride=16)
LEVELS = list(SHAPES)
CLASSES = 5
SMALL = PixelHeadOptions(convs_dim=6, num_convs=2, num_classes=CLASSES, norm="BN")


def upernet(norm="BN"):
    torch.manual_seed(0)
    head = UperNetHead(
        levels=LEVELS,
        shapes=[SHAPES[x] for x in LEVELS],
        options=PixelHeadOptions(convs_dim=6, num_classes=CLASSES, norm=norm, pool_sizes=(1, 2, 3)),
    )
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return head.eval()


def features(height=44, width=60, batch=2):
    torch.manual_seed(1)
    return {n: torch.randn(batch, s.channels, -(-height // s.stride), -(-width // s.stride)) for n, s in SHAPES.items()}


def conv(state, name, x, kernel):
    x = F.conv2d(x, state[f"{name}.conv.weight"], padding=kernel // 2)
    norm = [state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return F.relu(F.batch_norm(x, *norm))


def up(x, like):
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def test_upernet_equals_its_definition():
    """Written out from the paper's figure with the parameters read by mmseg's names."""
    head, maps = upernet(), features()
    s = head.state_dict()
    top = maps["res4"]
    pools = [up(conv(s, f"psp_modules.{i}.1", F.adaptive_avg_pool2d(top, n), 1), top) for i, n in enumerate((1, 2, 3))]
    p4 = conv(s, "bottleneck", torch.cat([top, *pools], 1), 3)
    l3 = conv(s, "lateral_convs.1", maps["res3"], 1)
    l2 = conv(s, "lateral_convs.0", maps["res2"], 1)
    l3 = l3 + up(p4, l3)
    l2 = l2 + up(l3, l2)
    outs = [conv(s, "fpn_convs.0", l2, 3), conv(s, "fpn_convs.1", l3, 3), p4]
    feature = conv(s, "fpn_bottleneck", torch.cat([up(x, l2) for x in outs], 1), 3)
    expected = F.conv2d(feature, s["conv_seg.weight"], s["conv_seg.bias"])
    output = head(maps)
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.features["main"], feature)
    assert (head.stride, head.memory_length, head.uses_prior) == (4, 0, False)


def test_key_names_are_mmsegs():
    norm = [f"bn.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    modules = [f"psp_modules.{i}.1" for i in range(3)] + ["bottleneck", "fpn_bottleneck"]
    modules += [f"{name}.{i}" for name in ("lateral_convs", "fpn_convs") for i in range(2)]
    expected = {f"{m}.{part}" for m in modules for part in ["conv.weight", *norm]}
    assert set(upernet().state_dict()) == expected | {"conv_seg.weight", "conv_seg.bias"}
    fcn = FCNHead(level="res3", shape=SHAPES["res3"], options=SMALL)
    expected = {f"convs.{i}.{part}" for i in range(2) for part in ["conv.weight", *norm]}
    assert set(fcn.state_dict()) == expected | {"conv_seg.weight", "conv_seg.bias"}


def test_fcn_equals_its_definition():
    torch.manual_seed(0)
    head = FCNHead(level="res3", shape=SHAPES["res3"], options=SMALL).eval()
    maps, s = features(), head.state_dict()
    feature = conv(s, "convs.1", conv(s, "convs.0", maps["res3"], 3), 3)
    torch.testing.assert_close(head(maps).logits, F.conv2d(feature, s["conv_seg.weight"], s["conv_seg.bias"]))
    assert head.stride == 8
    assert float(s["conv_seg.weight"].std()) < 0.02


def test_bad_heads_are_named():
    with pytest.raises(ValueError, match="at least two levels, got 1"):
        UperNetHead(levels=["res2"], shapes=[SHAPES["res2"]], options=PixelHeadOptions(norm="BN", pool_sizes=(1,)))
    with pytest.raises(ValueError, match=r"MODEL.SEM_SEG_HEAD.NUM_CONVS 0"):
        PixelHeadOptions(num_convs=0)
    cfg = load_config(overrides=["MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res2','res9']"])
    with pytest.raises(ValueError, match=r"IN_FEATURES \['res2', 'res9'\]: the backbone has res2, res3, res4"):
        UperNetHead(cfg, SHAPES)


BACKBONES = {
    "resnet18": ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"],
    "resnet18_d8": [
        *("MODEL.BACKBONE.NAME", "build_resnet_d8_backbone", "MODEL.RESNETS.DEPTH", "18"),
        *("MODEL.RESNETS.WIDTH_PER_GROUP", "16"),
    ],
    "mit_b0": ["MODEL.BACKBONE.NAME", "build_mit_backbone"],
    "internimage": [
        *("MODEL.BACKBONE.NAME", "build_internimage_backbone", "MODEL.INTERNIMAGE.CHANNELS", "16"),
        *("MODEL.INTERNIMAGE.DEPTHS", "[1,1,1,1]"),
    ],
    "swin_t": ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.OUT_NORM", "LN"],
    "convnext": ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "convnext_atto"],
    "beit": [
        *("MODEL.BACKBONE.NAME", "build_beit_backbone", "MODEL.BEIT.NAME", "beit_base_patch16_224"),
        *("MODEL.BEIT.IMG_SIZE", "64", "MODEL.BEIT.OUT_INDICES", "[0,1,2,3]"),
    ],
}
HEADS = {
    "upernet": [
        *("MODEL.META_ARCHITECTURE", "ClipSegmentor", "MODEL.SEM_SEG_HEAD.NAME", "UperNetHead"),
        *("MODEL.SEM_SEG_HEAD.CONVS_DIM", "16", "MODEL.AUX_HEADS", "['res4']", "MODEL.SEM_SEG_HEAD.NORM", "BN"),
        *("MODEL.CLIP_SEGMENTOR.AUX_CHANNELS", "16"),
    ],
    "mask": [
        *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "8", "MODEL.MASK_FORMER.DEC_LAYERS", "4"),
        *("MODEL.MASK_FORMER.HIDDEN_DIM", "32", "MODEL.MASK_FORMER.DIM_FEEDFORWARD", "32"),
        *("MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.SEM_SEG_HEAD.MASK_DIM", "32"),
        *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1", "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "32"),
    ],
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_works_with_both_kinds_of_heads(backbone, head):
    base = ["MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"]
    torch.manual_seed(0)
    model = build_model(load_config(overrides=[*base, *BACKBONES[backbone], *HEADS[head]]))
    labels = torch.randint(3, (2, 2)).repeat_interleave(32, 0).repeat_interleave(32, 1)
    clips = [
        Clip([torch.randint(256, (3, 64, 64), dtype=torch.uint8)], [labels], seed=i, video_id="v") for i in range(2)
    ]
    total = sum(model(clips).values())
    total.backward()
    used = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert any(n.startswith("backbone.") for n in used)
    assert any(n.startswith("sem_seg_head.") for n in used)
    odd = replace(clips[0], frames=[clips[0].frames[0][:, :50, :43]], height=100, width=90)
    assert [tuple(m.shape) for m in model.eval().predict([odd])[0]] == [(100, 90)]
