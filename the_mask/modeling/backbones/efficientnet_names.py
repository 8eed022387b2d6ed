"""Rename EfficientNet weights of the first PyTorch port (``_conv_stem``, ``_blocks.3._bn1``) to timm's names.

That port numbers all blocks in one row and a block's norms from 0; timm counts blocks within stages and norms from 1.
EfficientNet-Lite, which has no squeeze-and-excitation, is a special case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

MARK = "_conv_stem.weight"
OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
# With and without the expansion, which the blocks of the first stage do not have.
EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def is_first_port(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has these names."""
    return MARK in state


def to_timm_names(state: Mapping[str, Tensor], depths: Sequence[int]) -> dict[str, Tensor]:
    """Rename; no value changes.

    Args:
        state: tensors by the port's names.
        depths: blocks per stage of timm's model.

    Raises:
        ValueError: the number of blocks differs from the model's, or a name is unknown.
    """
    places = [f"blocks.{stage}.{block}" for stage, depth in enumerate(depths) for block in range(depth)]
    blocks = {name.split(".")[1] for name in state if name.startswith("_blocks.")}
    if blocks != {str(number) for number in range(len(places))}:
        raise ValueError(f"the file has {len(blocks)} blocks, the model {len(places)}: another size of EfficientNet")
    renamed = {}
    for name, value in state.items():
        if name.startswith("_blocks."):
            _, number, part, leaf = name.split(".", 3)
            expanded = f"_blocks.{number}._expand_conv.weight" in state
            names, place = {**(EXPANDED if expanded else PLAIN), **SQUEEZE}, f"{places[int(number)]}."
        else:
            part, leaf = name.split(".", 1)
            names, place = OUTER, ""
        if part not in names:
            raise ValueError(f"unknown tensor {name}")
        renamed[f"{place}{names[part]}.{leaf}"] = value
    return renamed
