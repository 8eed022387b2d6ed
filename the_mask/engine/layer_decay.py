"""Layer-wise and stage-wise decay of the learning rate, as a pure function of parameter names.

Each parameter gets an id, and its factor is ``rate ** (top - id)``. So the head (id ``top``) learns at the full rate
and the stem (id 0) at the lowest.

* ``layer``: the stem (patch embedding, class token) is 0, block b of stage s is 1 + blocks of earlier stages + b.
  Downsampling between stages, and a norm at the end of a stage, has the id of the next stage's first block (the last
  stage's norm: that of its own first block). ``top`` is 1 + the number of blocks. Used by InternImage and BEiT.
* ``stage``: stem and downsampling are 0, stage s is s + 1 (including the norm at its end). ``top`` is 1 +
  ``num_layers``. Used by ConvNeXt, with ``num_layers`` 12, which keeps all stages far from the head.

* ``vit``: block b of n has the factor rate^(n - 1 - b), the stem (patch embedding, prefix tokens, positions) that of
  block 0; the backbone's norm and all heads learn at the full rate. Used by EoMT and VidEoMT.

Everything outside the pretrained backbone (heads, and the pyramids and norms added for segmentation) has ``top``.
Sources: InternImage's released optimiser constructor, the BEiT and ConvNeXt segmentation code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from the_mask.config.keys.solver import NUM_STAGES, LayerDecayOptions

# InternImage-H, -G: one more norm inside the third level after every sixth block.
EXTRA_NORM_PERIOD = 6
# Parts of the mask decoder that the InternImage release treats as stem, because none of its rules matches them.
QUERY_PARTS = r"sem_seg_head\.predictor\.(query_embed|query_feat|level_embed|class_embed|mask_embed)\."


@dataclass(frozen=True)
class Family:
    """Patterns for the parameter names of one family of backbones, after ``backbone.``; "" matches nothing.

    Attributes:
        block: parameters of a block; groups ``s`` (stage; without it there is one) and ``b`` (block).
        stem: parameters before the first stage.
        downsample: downsampling before stage ``s``.
        stage_norm: norm at the end of stage ``s``.
        extra_norm: the ``b``-th further norm inside stage ``s``.
        first: number of the first stage in the names.
        downsample_first: the same for ``downsample``, if it differs.
    """

    block: str
    stem: str
    downsample: str = ""
    stage_norm: str = ""
    extra_norm: str = ""
    first: int = 0
    downsample_first: int | None = None

    def find(self, pattern: str, name: str, first: int | None = None) -> tuple[int, int] | None:
        """(stage, block), counted from 0, of a full parameter name."""
        match = re.match(rf"backbone\.{pattern}", name) if pattern else None
        if match is None:
            return None
        first = self.first if first is None else first
        groups = match.groupdict()
        return int(groups.get("s") or first) - first, int(groups.get("b") or 0)


FAMILIES = {
    "InternImage": Family(
        block=r"levels\.(?P<s>\d)\.blocks\.(?P<b>\d+)\.",
        stem=r"patch_embed\.",
        downsample=r"levels\.(?P<s>\d)\.downsample\.",
        downsample_first=-1,  # it is at the end of the previous stage
        stage_norm=r"levels\.(?P<s>\d)\.norm\.",
        extra_norm=r"levels\.(?P<s>\d)\.post_norms\.(?P<b>\d+)\.",
    ),
    "Swin or ConvNeXt of timm": Family(
        block=r"model\.(layers|stages)\.(?P<s>\d)\.blocks\.(?P<b>\d+)\.",
        stem=r"model\.(patch_embed|stem|absolute_pos_embed|pos_embed)",
        downsample=r"model\.(layers|stages)\.(?P<s>\d)\.downsample\.",
    ),
    "ResNet of timm": Family(block=r"model\.layer(?P<s>\d)\.(?P<b>\d+)\.", stem=r"model\.(conv1|bn1)\.", first=1),
    "BEiT or plain ViT": Family(
        block=r"model\.blocks\.(?P<b>\d+)\.", stem=r"model\.(patch_embed|cls_token|reg_token|pos_embed|norm_pre)"
    ),
    "MiT": Family(
        block=r"block(?P<s>\d)\.(?P<b>\d+)\.",
        stem=r"patch_embed1\.",
        downsample=r"patch_embed(?P<s>[2-4])\.",
        stage_norm=r"norm(?P<s>\d)\.",
        first=1,
    ),
    "ResNet": Family(block=r"res(?P<s>\d)\.(?P<b>\d+)\.", stem=r"stem\.", first=2),
}


def layer_decay_factors(names: Iterable[str], decay: LayerDecayOptions) -> dict[str, float]:
    """Factor on the learning rate of each parameter.

    Args:
        names: full names of all parameters of a model, ``backbone.model.stages.0.blocks.1.gamma``, ...
        decay: the decay.

    Raises:
        ValueError: decay is configured, but no name belongs to a block of a known backbone.
    """
    names = list(names)
    if decay.mode == "none":
        return dict.fromkeys(names, 1.0)
    ids, top = layer_ids(names, decay)
    return {name: decay.rate ** (top - ids[name]) for name in names}


def layer_ids(names: Iterable[str], decay: LayerDecayOptions) -> tuple[dict[str, int], int]:
    """Id of each parameter, 0..top, and ``top``; see the module's docstring.

    Raises:
        ValueError: no name belongs to a block of a known backbone, mode ``stage`` without four stages, or mode ``vit``
            for a backbone with stages.
    """
    names = list(names)
    family, depths = _family_and_depths(names)
    if family is None:
        raise ValueError(
            f"SOLVER.LR_DECAY.MODE {decay.mode}: the model has no blocks whose decay is known ({', '.join(FAMILIES)} "
            "have); set it to none"
        )
    starts = [1 + sum(depths[:stage]) for stage in range(len(depths) + 1)]
    top = starts[-1]
    if decay.mode == "vit":
        if len(depths) != 1:
            raise ValueError(f"SOLVER.LR_DECAY.MODE vit needs a plain transformer, not one of {len(depths)} stages")
        # Block b has id b, the stem that of block 0, and everything after the blocks that of the last block.
        last = depths[0] - 1
        return {name: max(_layer_id(name, family, decay, starts, last + 1) - 1, 0) for name in names}, last
    if decay.mode == "stage":
        if len(depths) != NUM_STAGES:
            raise ValueError(
                f"SOLVER.LR_DECAY.MODE stage needs a backbone of four stages, not {len(depths)}: use layer"
            )
        top = 1 + (decay.num_layers or NUM_STAGES)
    return {name: _layer_id(name, family, decay, starts, top) for name in names}, top


def _family_and_depths(names: list[str]) -> tuple[Family | None, list[int]]:
    """The family that has blocks among the names, and its number of blocks per stage."""
    for family in FAMILIES.values():
        depths: dict[int, int] = {}
        for name in names:
            found = family.find(family.block, name)
            if found is not None:
                depths[found[0]] = max(depths.get(found[0], 0), found[1] + 1)
        if depths:
            return family, [depths.get(stage, 0) for stage in range(max(depths) + 1)]
    return None, []


def _layer_id(name: str, family: Family, decay: LayerDecayOptions, starts: list[int], top: int) -> int:
    """Id of one parameter. ``starts``: for ``layer``, the id of each stage's first block, and one past the last."""
    by_stage = decay.mode == "stage"
    if decay.quirk_queries and re.match(QUERY_PARTS, name):
        return 0
    if family.find(family.stem, name) is not None:
        return 0
    if (block := family.find(family.block, name)) is not None:
        return block[0] + 1 if by_stage else starts[block[0]] + block[1]
    if (extra := family.find(family.extra_norm, name)) is not None:
        stage, number = extra
        follows = number if decay.quirk_extra_norms else EXTRA_NORM_PERIOD * (number + 1) - 1
        return stage + 1 if by_stage else starts[stage] + follows
    if (downsample := family.find(family.downsample, name, family.downsample_first)) is not None:
        return 0 if by_stage else starts[downsample[0]]
    if (norm := family.find(family.stage_norm, name)) is not None:
        return norm[0] + 1 if by_stage else starts[min(norm[0] + 1, len(starts) - 2)]
    return top
