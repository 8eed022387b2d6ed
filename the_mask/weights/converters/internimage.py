"""InternImage: the released names are ours; classification files have heads to leave out."""

from __future__ import annotations

from the_mask.weights.converters.parts import Part
from the_mask.weights.converters.rules import Names, drop

NAMES = (
    Names(
        """
        patch_embed.conv{1,2}.* patch_embed.norm{1,2}.1.*
        levels.{0..3}.blocks.#.{norm1.0,norm2.0,mlp.fc1,mlp.fc2}.*
        levels.{0..3}.blocks.#.dcn.{dw_conv.0,dw_conv.1.1,offset,mask,input_proj,output_proj}.*
        levels.{0..2}.downsample.conv.weight levels.{0..2}.downsample.norm.1.*
        """
    ),
    Names("levels.{0..3}.blocks.#.gamma{1,2}", optional=True),
    Names("levels.{0..3}.norm.0.*", optional=True),
    # InternImage-H
    Names("levels.{0..3}.blocks.#.res_post_norm{1,2}.0.*", optional=True),
    # InternImage-H and -G
    Names("levels.2.post_norms.#.0.*", optional=True),
    Names("levels.{0..3}.blocks.#.dcn.center_feature_scale_proj_{weight,bias}", optional=True),
)

PARTS = (
    Part(
        "InternImage",
        "internimage",
        (r"levels\.0\.blocks\.0\.dcn\.offset\.weight",),
        (drop(r"(conv_head|head|dcnv3_head_x[34]|clip_projector|fc_norm)\..*", "classifier"),),
        NAMES,
    ),
)
