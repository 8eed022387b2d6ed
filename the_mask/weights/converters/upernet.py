"""UperNet and FCN heads: OpenMMLab's names are ours; its only auxiliary head is on the third level."""

from __future__ import annotations

from the_mask.weights.converters.parts import BOOKKEEPING, Part
from the_mask.weights.converters.rules import Names, drop, move

_NORM = "bn.{weight,bias,running_mean,running_var}"
_CLASSIFIER = Names("conv_seg.*")
_COUNTERS = drop(BOOKKEEPING, "bookkeeping")


def _layers(*names: str) -> Names:
    return Names(" ".join(f"{name}.conv.weight {name}.{_NORM}" for name in names))


AUXILIARY_LEVEL = "res4"

HEADS = (
    Part(
        "UperNet head",
        "mmseg",
        (r"psp_modules\.0\.1\.conv\.weight", r"fpn_bottleneck\.conv\.weight"),
        (),
        (
            _layers("psp_modules.{0..3}.1", "bottleneck", "lateral_convs.{0..2}", "fpn_convs.{0..2}", "fpn_bottleneck"),
            _CLASSIFIER,
        ),
    ),
    Part("FCN head", "mmseg", (r"convs\.0\.conv\.weight", r"conv_seg\.weight"), (), (_layers("convs.#"), _CLASSIFIER)),
)
AUXILIARY = (
    Part(
        "FCN auxiliary head",
        "mmseg",
        (r"convs\.0\.conv\.weight", r"conv_seg\.weight"),
        (_COUNTERS, move(r"(convs\..*|conv_seg\..*)", rf"{AUXILIARY_LEVEL}.\1")),
        (_layers(f"{AUXILIARY_LEVEL}.convs.#"), Names(f"{AUXILIARY_LEVEL}.conv_seg.*")),
    ),
)
