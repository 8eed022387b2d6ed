"""Layer-wise and stage-wise decay against hand-made tables of the published rules, and on real backbones."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from engine_fakes import CONFIGS
from torch import nn

import the_mask.modeling  # noqa: F401
from the_mask.config import config_names, load_config
from the_mask.config.keys.solver import LayerDecayOptions
from the_mask.engine.layer_decay import layer_decay_factors, layer_ids
from the_mask.engine.optimizer import build_optimizer

LAYER = LayerDecayOptions(mode="layer", rate=0.95)
HEAD = [f"sem_seg_head.predictor.{part}" for part in ("query_feat.weight", "mask_embed.layers.0.weight", "norm.bias")]


def backbone_names(name: str, *options) -> list[str]:
    """Full parameter names of a backbone at full size; no memory is used."""
    cfg = load_config(None, ["MODEL.BACKBONE.NAME", name, *map(str, options)])
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    return [f"backbone.{name}" for name, _ in backbone.named_parameters()]


def internimage_h_rule(name: str, quirks: bool) -> int:
    """The table of the specification for InternImage-H, written out."""
    firsts = {0: 1, 1: 7, 2: 13, 3: 45}
    if name.startswith("backbone.patch_embed"):
        return 0
    match = re.match(r"backbone\.levels\.(\d)\.(\w+)\.(\d+)?", name)
    assert match is not None
    level, part, number = int(match[1]), match[2], match[3]
    if part == "blocks":
        return firsts[level] + int(number)
    if part == "post_norms":
        assert level == 2
        return 13 + int(number) if quirks else {0: 18, 1: 24, 2: 30, 3: 36, 4: 42}[int(number)]
    assert part in ("norm", "downsample")
    return firsts[min(level + 1, 3)]


@pytest.mark.parametrize("quirks", [False, True])
def test_internimage_h(quirks: bool) -> None:
    names = backbone_names("build_internimage_backbone", "MODEL.INTERNIMAGE.VARIANT", "H")
    decay = LayerDecayOptions(mode="layer", rate=0.95, quirk_extra_norms=quirks, quirk_queries=quirks)
    ids, top = layer_ids([*names, *HEAD], decay)
    assert top == 51
    assert {name: ids[name] for name in names} == {name: internimage_h_rule(name, quirks) for name in names}
    assert [ids[name] for name in HEAD] == ([0, 0, 51] if quirks else [51] * 3)
    factors = layer_decay_factors([*names, *HEAD], decay)
    assert factors["backbone.patch_embed.conv1.weight"] == pytest.approx(0.95**51)
    assert factors["backbone.patch_embed.conv1.weight"] == pytest.approx(0.073, abs=5e-4)
    assert factors["backbone.levels.3.blocks.5.mlp.fc1.bias"] == 0.95


@pytest.mark.parametrize(("variant", "num_layers"), [("T", 30), ("L", 37), ("XL", 39), ("G", 56)])
def test_internimage_sizes_have_the_published_number_of_layers(variant: str, num_layers: int) -> None:
    names = backbone_names("build_internimage_backbone", "MODEL.INTERNIMAGE.VARIANT", variant)
    assert layer_ids(names, LAYER)[1] == num_layers + 1


def test_beit_large() -> None:
    """Block i gets 0.95^(24-i), embeddings 0.95^25, heads and the added pyramid 1."""
    options = ("MODEL.BEIT.NAME", "beit_base_patch16_224", "MODEL.BEIT.OUT_INDICES", [3, 5, 7, 11])
    names = backbone_names("build_beit_backbone", *options)
    # The large model has the base model's names, and twelve blocks more.
    names += [
        re.sub(r"blocks\.\d+", f"blocks.{block}", name)
        for name in names
        if ".blocks.0." in name
        for block in range(12, 24)
    ]
    factors = layer_decay_factors([*names, *HEAD], LAYER)
    for name in names:
        match = re.match(r"backbone\.model\.blocks\.(\d+)\.", name)
        if match is not None:
            expected = 0.95 ** (24 - int(match[1]))
        else:
            expected = 1.0 if name.startswith("backbone.fpn.") else 0.95**25
        assert factors[name] == pytest.approx(expected), name
    assert all(factors[name] == 1 for name in HEAD)


def test_convnext_xl_by_stage_as_published() -> None:
    """0.9^(13-id): id 0 stem and downsampling, 1 to 4 stages, 13 heads."""
    names = backbone_names(*("build_timm_backbone", "MODEL.TIMM.NAME", "convnext_xlarge", "MODEL.TIMM.OUT_NORM", "LN"))
    factors = layer_decay_factors([*names, *HEAD], LayerDecayOptions(mode="stage", rate=0.9, num_layers=12))
    for name in names:
        stage = re.match(r"backbone\.model\.stages\.(\d)\.blocks\.", name)
        if stage is not None:
            expected = 0.9 ** (13 - (int(stage[1]) + 1))
        else:
            expected = 1.0 if re.match(r"backbone\.norm\d", name) else 0.9**13
        assert factors[name] == pytest.approx(expected), name
    assert all(factors[name] == 1 for name in HEAD)


FAMILIES = {
    "swin": ("build_timm_backbone", "MODEL.TIMM.NAME", "swin_tiny_patch4_window7_224", "MODEL.TIMM.OUT_NORM", "LN"),
    "convnext": ("build_timm_backbone", "MODEL.TIMM.NAME", "convnext_tiny"),
    "timm resnet": ("build_timm_backbone", "MODEL.TIMM.NAME", "resnet50"),
    "mit": ("build_mit_backbone", "MODEL.MIT.VARIANT", "B1"),
    "resnet": ("build_resnet_backbone", "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.NORM", "BN"),
    "resnet d8": ("build_resnet_d8_backbone", "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.NORM", "BN"),
    "internimage": ("build_internimage_backbone", "MODEL.INTERNIMAGE.VARIANT", "T"),
}
DEPTHS = {"swin": (2, 2, 6, 2), "convnext": (3, 3, 9, 3), "mit": (2, 2, 2, 2), "internimage": (4, 4, 18, 4)}
ADDED = {"swin": "backbone.norm0.weight"}
# Named examples: id by layer; the stage's id follows from the second number.
EXAMPLES = {
    "swin": {
        "model.patch_embed.proj.weight": (0, 0),
        "model.layers.0.blocks.1.attn.relative_position_bias_table": (2, 1),
        "model.layers.1.downsample.reduction.weight": (3, 0),
        "model.layers.3.blocks.1.mlp.fc2.bias": (12, 4),
    },
    "convnext": {"model.stem.0.weight": (0, 0), "model.stages.2.downsample.1.weight": (7, 0)},
    "timm resnet": {"model.bn1.weight": (0, 0), "model.layer2.0.downsample.0.weight": (4, 2)},
    "mit": {"patch_embed1.norm.bias": (0, 0), "patch_embed2.proj.weight": (3, 0), "norm1.weight": (3, 1)}
    | {"norm4.weight": (7, 4), "block3.1.mlp.dwconv.dwconv.bias": (6, 3)},
    "resnet": {"stem.conv1.weight": (0, 0), "res3.0.shortcut.weight": (4, 2), "res5.2.conv3.weight": (16, 4)},
    "resnet d8": {"stem.conv1_1.weight": (0, 0), "res2.2.conv1.weight": (3, 1)},
    "internimage": {"levels.0.downsample.conv.weight": (5, 0), "levels.0.norm.0.weight": (5, 1)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    names = backbone_names(*FAMILIES[family])
    by_layer, top = layer_ids([*names, *HEAD], LAYER)
    by_stage, stages = layer_ids([*names, *HEAD], LayerDecayOptions(mode="stage", rate=0.9))
    assert top == 1 + sum(DEPTHS.get(family, (3, 4, 6, 3)))
    assert stages == 5
    for name, (layer, stage) in EXAMPLES[family].items():
        assert (by_layer[f"backbone.{name}"], by_stage[f"backbone.{name}"]) == (layer, stage)
    # Everything but what was added for segmentation belongs to a layer below the head, and no layer is empty.
    assert {by_layer[name] for name in names if name != ADDED.get(family) and ".norm" not in name} == set(range(top))
    at_top = [name for name in names if by_layer[name] == top]
    assert at_top == [
        f"backbone.norm{i}.{part}" for i in range(4 if family in ADDED else 0) for part in ("weight", "bias")
    ]
    assert {by_stage[name] for name in names if name not in at_top} == set(range(5))
    # Ids never fall on the way from image to head, apart from what the stage rule gives to downsampling.
    blocks = [by_layer[name] for name in names if re.search(r"block|layer\d|res\d", name) and "downsample" not in name]
    assert all(a <= b for a, b in itertools.pairwise(blocks))


def test_none_is_one_rate_for_all() -> None:
    assert layer_decay_factors(["a", "backbone.b"], LayerDecayOptions()) == {"a": 1.0, "backbone.b": 1.0}


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"no blocks whose decay is known.*InternImage"):
        layer_ids(["backbone.conv.weight", "head.weight"], LAYER)
    with pytest.raises(ValueError, match="needs a backbone of four stages, not 1: use layer"):
        layer_ids(["backbone.model.blocks.0.gamma_1"], LayerDecayOptions(mode="stage", rate=0.9))
    with pytest.raises(ValueError, match=r"LR_DECAY.MODE 'block': expected one of 'none', 'layer', 'stage'"):
        LayerDecayOptions(mode="block")
    for rate in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"LR_DECAY.RATE {rate}"):
            LayerDecayOptions(mode="layer", rate=rate)
    for decay in ({"mode": "layer", "num_layers": 12}, {"mode": "stage", "num_layers": 3}):
        with pytest.raises(ValueError, match=r"LR_DECAY.NUM_LAYERS"):
            LayerDecayOptions(**decay)


class TinyInternImage(nn.Module):
    """Names of an InternImage with one block per level, a decoder, and one parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        level = nn.ModuleDict(
            {"blocks": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})])}
        )
        level["blocks"][0].register_parameter("gamma1", nn.Parameter(torch.ones(2)))
        self.backbone = nn.ModuleDict({"patch_embed": nn.Linear(2, 2), "levels": nn.ModuleList([level])})
        self.head = nn.ModuleDict({"sampling_offsets": nn.Linear(2, 2), "out": nn.Linear(2, 2)})


def test_build_optimizer_applies_decay_and_the_release_weight_decay() -> None:
    """Weight decay 0 for 1-D parameters and names with sampling_offsets, 0.05 else; rates 2e-5 x 0.5^(2 - id)."""
    words = "SOLVER.LR_DECAY.MODE layer SOLVER.LR_DECAY.RATE 0.5 SOLVER.BACKBONE_MULTIPLIER 1.0 SOLVER.BASE_LR 2e-5"
    words += " SOLVER.WEIGHT_DECAY_VECTOR 0.0 SOLVER.NO_DECAY ['sampling_offsets']"
    optimizer = build_optimizer(load_config(None, words.split()), TinyInternImage())
    found = {name: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for name in group["names"]}
    assert found == {
        "backbone.patch_embed.weight": (pytest.approx(0.5e-5), 0.05),
        "backbone.patch_embed.bias": (pytest.approx(0.5e-5), 0.0),
        "backbone.levels.0.blocks.0.gamma1": (pytest.approx(1e-5), 0.0),
        "backbone.levels.0.blocks.0.fc.weight": (pytest.approx(1e-5), 0.05),
        "backbone.levels.0.blocks.0.fc.bias": (pytest.approx(1e-5), 0.0),
        "backbone.levels.0.blocks.0.norm.weight": (pytest.approx(1e-5), 0.0),
        "backbone.levels.0.blocks.0.norm.bias": (pytest.approx(1e-5), 0.0),
        "head.sampling_offsets.weight": (pytest.approx(2e-5), 0.0),
        "head.sampling_offsets.bias": (pytest.approx(2e-5), 0.0),
        "head.out.weight": (pytest.approx(2e-5), 0.05),
        "head.out.bias": (pytest.approx(2e-5), 0.0),
    }


def test_published_recipes_reach_the_optimizer() -> None:
    """What the configs of the third-place report say about decay and warm-up."""
    expected = {
        "mask2former_internimage_h": ("layer", 0.95, 2e-5),
        "mask2former_internimage_l": ("layer", 0.94, 2e-5),
        "upernet_internimage_xl": ("layer", 0.94, 2e-5),
        "upernet_internimage_h": ("layer", 0.95, 2e-5),
        "upernet_convnext_xl": ("stage", 0.9, 8e-5),
        "upernet_swin_l": ("none", 1.0, 3e-5),
    }
    for name, recipe in expected.items():
        solver = load_config(CONFIGS / f"vspw/{name}.yaml").SOLVER
        assert recipe == (solver.LR_DECAY.MODE, solver.LR_DECAY.RATE, solver.BASE_LR)
        assert (solver.WARMUP_ITERS, solver.POLY_LR_POWER) == (1500, 1.0)
    assert load_config(CONFIGS / "vspw/mask2former_internimage_h.yaml").SOLVER.WARMUP_FACTOR == 1e-6


def test_every_vspw_model_of_the_report_has_its_pretraining() -> None:
    """The two documented commands use one name; both configs have the same model but for the classes."""
    known = set(config_names())
    names = {name.removeprefix("coco_stuff164k/") for name in known if name.startswith("coco_stuff164k/")}
    shared = sorted(name for name in names if f"vspw/{name}" in known)
    backbones = ("r50", "swin_l", "convnext_xl", "internimage_l", "internimage_xl", "internimage_h")
    assert {f"{head}_{backbone}" for head in ("mask2former", "upernet") for backbone in backbones} <= set(shared)
    assert {"mask2former_beit_l", "upernet_beitl", "the_mask_internimage_h_1f", "the_mask_swin_l_1f"} <= set(shared)
    for name in shared:
        first, second = (load_config(CONFIGS / folder / f"{name}.yaml").MODEL for folder in ("coco_stuff164k", "vspw"))
        assert (first.SEM_SEG_HEAD.NUM_CLASSES, second.SEM_SEG_HEAD.NUM_CLASSES) == (171, 124)
        for parts in (first, second):
            parts.SEM_SEG_HEAD.NUM_CLASSES = 0
            parts.INTERNIMAGE.CHECKPOINT = True  # spends time to save memory, changes nothing else
            parts.CLIP_SEGMENTOR.OHEM.ENABLED = False
            parts.CLIP_SEGMENTOR.OHEM.MIN_KEPT = 0
        assert first == second, name


@pytest.mark.parametrize("kind", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3_qkvb"])
def test_plain_vit_follows_the_published_rule(kind):
    names = [*backbone_names("build_vit_backbone", "MODEL.VIT.NAME", kind), *HEAD]
    factors = layer_decay_factors(names, LayerDecayOptions(mode="vit", rate=0.8))
    for name in names:
        block = re.match(r"backbone\.model\.blocks\.(\d+)\.", name)
        stem = re.match(r"backbone\.model\.(patch_embed|cls_token|reg_token|pos_embed)", name)
        power = 11 - int(block[1]) if block else 11 if stem else 0
        assert factors[name] == pytest.approx(0.8**power), name
    assert factors["backbone.model.norm.weight"] == 1.0


def test_vit_decay_needs_a_plain_transformer():
    names = backbone_names("build_mit_backbone")
    with pytest.raises(ValueError, match="MODE vit needs a plain transformer"):
        layer_ids(names, LayerDecayOptions(mode="vit", rate=0.8))


def test_two_stages_split_the_groups():
    cfg = load_config(CONFIGS / "debug" / "eomt_debug.yaml", ["MODEL.DEVICE", "cpu"])
    groups = build_optimizer(cfg, build_model(cfg)).param_groups
    for group in groups:
        assert all(name.startswith("backbone.") == group["second_stage"] for name in group["names"])
    assert {group["second_stage"] for group in groups} == {True, False}
