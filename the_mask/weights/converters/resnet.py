"""ResNet: from the names of torchvision, OpenMMLab's deep stem ("v1c") and Hugging Face to Detectron2's."""

from __future__ import annotations

import re

from the_mask.weights.converters.parts import BOOKKEEPING, Part
from the_mask.weights.converters.rules import Names, Rule, drop, move

_NORM = "norm.{weight,bias,running_mean,running_var}"


def names(stem: str) -> tuple[Names, ...]:
    """Detectron2's names; ``stem`` is a template of the stem's convolutions."""
    return (
        Names(
            f"stem.{stem}.weight stem.{stem}.{_NORM} res{{2..5}}.#.conv{{1,2}}.weight res{{2..5}}.#.conv{{1,2}}.{_NORM}"
        ),
        # Bottlenecks, from ResNet-50 on.
        Names(f"res{{2..5}}.#.conv3.weight res{{2..5}}.#.conv3.{_NORM}", optional=True),
        Names(f"res2.0.shortcut.weight res2.0.shortcut.{_NORM}", optional=True),
        Names(f"res{{3..5}}.0.shortcut.weight res{{3..5}}.0.shortcut.{_NORM}"),
    )


_PLAIN, _DEEP = names("conv1"), names("conv1_{1,2,3}")
_COUNTERS = drop(BOOKKEEPING, "bookkeeping")


def _layer(rest: str):
    """``layer1`` is ``res2``."""
    return lambda match: match.expand(rest).replace("<res>", f"res{int(match['stage']) + 1}")


# Detectron2's own conversion of torchvision's files puts the classifier below the stem.
_CLASSIFIER = (drop(r"(stem\.)?fc\.(weight|bias)", "classifier"),)
_BLOCKS: tuple[Rule, ...] = (
    _COUNTERS,
    *_CLASSIFIER,
    move(r"layer(?P<stage>\d)\.(\d+)\.conv(\d)\.weight", _layer(r"<res>.\2.conv\3.weight")),
    move(r"layer(?P<stage>\d)\.(\d+)\.bn(\d)\.(\w+)", _layer(r"<res>.\2.conv\3.norm.\4")),
    move(r"layer(?P<stage>\d)\.(\d+)\.downsample\.0\.weight", _layer(r"<res>.\2.shortcut.weight")),
    move(r"layer(?P<stage>\d)\.(\d+)\.downsample\.1\.(\w+)", _layer(r"<res>.\2.shortcut.norm.\3")),
)


def _deep_stem(match: re.Match[str]) -> str:
    """Name of a layer by index: convolution, norm and ReLU in turn, three times (0, 1; 3, 4; 6, 7)."""
    number, is_norm = divmod(int(match["index"]), 3)
    return f"stem.conv1_{number + 1}.{'norm.' if is_norm else ''}{match['leaf']}"


_HF_STAGE = r"encoder\.stages\.(?P<stage>\d)\.layers\.(?P<block>\d+)\."


def _huggingface(match: re.Match[str]) -> str:
    conv = "shortcut" if match["conv"] is None else f"conv{int(match['conv']) + 1}"
    norm = "norm." if match["what"] == "normalization" else ""
    return f"res{int(match['stage']) + 2}.{match['block']}.{conv}.{norm}{match['leaf']}"


PARTS = (
    Part(
        "ResNet v1c, OpenMMLab layout",
        "resnet-v1c",
        (r"stem\.0\.weight", r"stem\.6\.weight", r"layer1\.0\.conv1\.weight"),
        (*_BLOCKS, move(r"stem\.(?P<index>[013467])\.(?P<leaf>\w+)", _deep_stem)),
        _DEEP,
    ),
    Part(
        "ResNet, torchvision layout",
        "torchvision-resnet",
        (r"conv1\.weight", r"layer1\.0\.conv1\.weight", r"bn1\.running_mean"),
        (*_BLOCKS, move(r"conv1\.weight", "stem.conv1.weight"), move(r"bn1\.(\w+)", r"stem.conv1.norm.\1")),
        _PLAIN,
    ),
    Part(
        "ResNet, Hugging Face layout",
        "hf-mask2former",
        (r"embedder\.embedder\.convolution\.weight", r"encoder\.stages\.0\.layers\.0\..*"),
        (
            _COUNTERS,
            move(r"embedder\.embedder\.convolution\.weight", "stem.conv1.weight"),
            move(r"embedder\.embedder\.normalization\.(\w+)", r"stem.conv1.norm.\1"),
            move(
                rf"{_HF_STAGE}(?:shortcut|layer\.(?P<conv>\d))\.(?P<what>convolution|normalization)\.(?P<leaf>\w+)",
                _huggingface,
            ),
        ),
        _PLAIN,
    ),
    Part("ResNet", "mask2former", (r"stem\.conv1\.weight", r"res2\.0\.conv1\.weight"), _CLASSIFIER, _PLAIN),
    Part(
        "ResNet with a deep stem",
        "mask2former",
        (r"stem\.conv1_1\.weight", r"res2\.0\.conv1\.weight"),
        _CLASSIFIER,
        _DEEP,
    ),
)
