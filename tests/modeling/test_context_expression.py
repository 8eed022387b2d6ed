"""Expressions of context blocks: parsing, building, and errors that name the place."""

import pytest
import torch
from detectron2.layers import ShapeSpec

import the_mask.modeling  # noqa: F401  (fills the registries)
from the_mask.config import load_config
from the_mask.modeling.pixel.context.expression import ExpressionError, Name, Operation, parse
from the_mask.modeling.pixel.context.tree import BlockTree
from the_mask.modeling.pixel.context.types import ClipFeatures

LEVELS = {"res3": ShapeSpec(channels=8, stride=8), "res4": ShapeSpec(channels=12, stride=16)}
LEVELS["res5"] = ShapeSpec(channels=16, stride=32)
SMALL = [
    *("MODEL.SEM_SEG_HEAD.NORM", "BN", "MODEL.CONTEXT.MEMORY_LENGTH", "2"),
    *("MODEL.BLOCKS.TMA.KEY_CHANNELS", "4", "MODEL.BLOCKS.TMA.VALUE_CHANNELS", "6", "MODEL.BLOCKS.TMA.CHANNELS", "10"),
    *("MODEL.BLOCKS.EMBED.CHANNELS", "14", "MODEL.BLOCKS.PPM.CHANNELS", "10", "MODEL.BLOCKS.CHANNEL.CHANNELS", "10"),
    *("MODEL.BLOCKS.UPER.CHANNELS", "10", "MODEL.BLOCKS.UPER.LEVELS", "['res3','res4','res5']"),
    *("MODEL.BLOCKS.AFNB.KEY_CHANNELS", "4"),
]


def build(text, *overrides, levels=LEVELS, root="res5", change=None):
    cfg = load_config(overrides=[*SMALL, *overrides])
    if change is not None:
        change(cfg.MODEL.BLOCKS)
    torch.manual_seed(0)
    return BlockTree(text, cfg, levels, root)


def features(batch=2, seed=0):
    torch.manual_seed(seed)
    return {name: torch.randn(batch, s.channels, 64 // s.stride, 96 // s.stride) for name, s in LEVELS.items()}


def shape_of(node):
    if isinstance(node, Name):
        return node.name
    return [node.kind, *map(shape_of, node.parts)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tma", "tma"),
        ("  (tma ) ", "tma"),
        ("a>b>c", [">", "a", "b", "c"]),
        ("afnb > (apnb + channel)", [">", "afnb", ["+", "apnb", "channel"]]),
        ("uper & (embed > tma > class_memory)", ["&", "uper", [">", "embed", "tma", "class_memory"]]),
        ("(a > b) > c", [">", [">", "a", "b"], "c"]),
    ],
)
def test_parse(text, expected):
    assert shape_of(parse(text)) == expected


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("", 0, "the expression ends"),
        ("a >", 3, "the expression ends"),
        ("a > > b", 4, "got '>'"),
        ("a b", 2, r"expected >, \+ or & before 'b'"),
        ("a > (b + c", 4, "never closed"),
        ("a > b)", 5, r"unmatched \)"),
        ("a > b + c", 6, "'>' and '\\+' are mixed"),
        ("a & b + c", 6, "say with parentheses"),
        ("a > 7b", 4, "strange character '7'"),
        ("a * b", 2, "strange character"),
        ("()", 1, "got '\\)'"),
    ],
)
def test_parse_errors_name_the_position(text, position, message):
    with pytest.raises(ExpressionError, match=message) as caught:
        parse(text)
    assert caught.value.position == position
    assert str(caught.value).splitlines()[-1] == "    " + " " * position + "^"


@pytest.mark.parametrize(
    ("text", "overrides", "position", "message"),
    [
        ("tma > apbn", [], 6, "unknown block 'apbn'; did you mean apnb?"),
        ("tma + embed", [], 4, r"equal channels, these have 10, 14"),
        ("ppm > tma", ["MODEL.CONTEXT.MEMORY_LENGTH", "0"], 6, "needs a memory: set MODEL.CONTEXT.MEMORY_LENGTH"),
        ("ppm & afnb", ["MODEL.BLOCKS.AFNB.LEVEL", "res2"], 6, "reads level 'res2'; there are res3, res4, res5, main"),
        ("ppm > ppm", [], 6, "occurs twice; call the second ppm2"),
        ("apnb", ["MODEL.BLOCKS.APNB.POOL", "ball"], 0, "POOL 'ball': expected one of cube"),
        ("cc", ["MODEL.BLOCKS.CC.R", "0"], 0, "R 0: expected at least 1"),
        ("embed", ["MODEL.BLOCKS.EMBED.SIZE_LEVEL", "res3"], 0, "SIZE_LEVEL 'res3': expected one of LEVELS, main"),
        ("ppm > apnb", ["MODEL.BLOCKS.APNB.INCLUDE_CURRENT", "True"], 6, "INCLUDE_CURRENT needs .* 10 and 16 channels"),
    ],
)
def test_build_errors_name_the_position(text, overrides, position, message):
    with pytest.raises(ExpressionError, match=message) as caught:
        build(text, *overrides)
    assert caught.value.position == position


def test_instances_inherit_from_their_type_and_refuse_unknown_options():
    from detectron2.config import CfgNode

    def two(blocks):
        blocks.TMA2 = CfgNode({"TYPE": "tma", "KEY_CHANNELS": 3})

    tree = build("embed > tma > tma2", change=two)
    assert tree.blocks["tma"].projector.query_key[0].conv.out_channels == 4
    second = tree.blocks["tma2"].projector
    assert second.query_key[0].conv.out_channels == 3
    assert second.query_value[0].conv.out_channels == 6
    # Memory passed embed (14 channels), not tma.
    assert second.memory_key[0][0].conv.in_channels == 14
    assert second.query_key[0].conv.in_channels == 10

    def odd(blocks):
        blocks.TMA2 = CfgNode({"TYPE": "tma", "KEYS": 3})

    with pytest.raises(ExpressionError, match=r"MODEL\.BLOCKS\.TMA2 has KEYS, which a block of type tma does not know"):
        build("tma2", change=odd)


def test_what_the_tree_asks_of_the_memory():
    image = build("ppm + channel")
    assert (image.memory_length, image.memory_levels) == (0, ())
    assert build("afnb > tma").memory_levels == ("res5",)
    embedded = build(
        "embed > tma", "MODEL.BLOCKS.EMBED.LEVELS", "['res3','res4']", "MODEL.BLOCKS.TMA.MEMORY_LENGTH", "3"
    )
    assert (embedded.memory_length, embedded.memory_levels) == (3, ("res3", "res4"))
    assert embedded.out_shape == ShapeSpec(channels=10, stride=8)
    # Only the chain that embeds sees embedded memory.
    both = build("tma2 & (embed > tma)", change=lambda blocks: blocks.merge_from_other_cfg(_tma2()))
    assert both.memory_levels == ("res5",)
    assert both.out_shape == ShapeSpec(channels=20, stride=32)
    assert both.is_concat


def _tma2():
    from detectron2.config import CfgNode

    return CfgNode({"TMA2": CfgNode({"TYPE": "tma"})})


def test_operators_compute_what_they_say():
    tree = build("ppm + channel")
    tree.blocks.eval()
    x = features()
    parts = [tree.blocks[name]({**x, "main": x["res5"]}).feature for name in ("ppm", "channel")]
    torch.testing.assert_close(tree.run(x).feature, parts[0] + parts[1])

    tree = build("ppm & uper")
    tree.blocks.eval()
    main = {**x, "main": x["res5"]}
    fine = tree.blocks["uper"](main).feature
    coarse = tree.blocks["ppm"](main).feature
    coarse = torch.nn.functional.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(tree.run(x).feature, torch.cat([coarse, fine], 1))
    assert tree.out_shape == ShapeSpec(channels=20, stride=8)


@pytest.mark.parametrize("fold", [True, False])
def test_chain_takes_memory_through_embed_but_not_through_afnb(fold):
    tree = build("embed > afnb > tma")
    tree.fold_memory = fold
    tree.blocks.eval()
    for parameter in tree.blocks.parameters():
        if parameter.dim() == 4:
            torch.nn.init.normal_(parameter, std=0.2)
    x, past = features(), [features(seed=s) for s in (1, 2)]
    memory = ClipFeatures(tuple({"res5": f["res5"]} for f in past), torch.ones(2, 2, dtype=torch.bool))
    embed, afnb, tma = (tree.blocks[name] for name in ("embed", "afnb", "tma"))
    query = {**x, "main": embed({**x, "main": x["res5"]}).feature}
    query = {**x, "main": afnb(query).feature}
    kept = tuple({"main": embed({"main": f["res5"]}).feature} for f in past)
    expected = tma(query, ClipFeatures(kept, memory.valid)).feature
    torch.testing.assert_close(tree.run(x, memory).feature, expected)


def test_auxiliary_logits_come_out_of_the_tree_in_training():
    tree = build("ppm + channel", "MODEL.BLOCKS.CHANNEL.CLASSIFIER", "True", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7")
    output = tree.run(features())
    assert output.aux_logits["channel"].shape[1] == 7
    assert output.aux_weights == {"channel": 1.0}
    tree.blocks.eval()
    assert tree.run(features()).aux_logits == {}


def test_operation_is_flat_per_operator():
    node = parse("a + b + c")
    assert isinstance(node, Operation)
    assert len(node.parts) == 3
