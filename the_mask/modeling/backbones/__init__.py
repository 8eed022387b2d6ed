"""Backbones: functions in Detectron2's ``BACKBONE_REGISTRY`` whose models return features ``res2`` ... ``res5``.

Importing this package registers them; ``MODEL.BACKBONE.NAME`` chooses one.
"""

from the_mask.modeling.backbones.bisenet import build_bisenet_r18_backbone
from the_mask.modeling.backbones.internimage import InternImage, build_internimage_backbone
from the_mask.modeling.backbones.mit import MixTransformer, build_mit_backbone
from the_mask.modeling.backbones.resnet_d8 import build_resnet_d8_backbone
from the_mask.modeling.backbones.swiftnet_resnet18 import build_swiftnet_r18_backbone
from the_mask.modeling.backbones.timm_backbone import build_beit_backbone, build_timm_backbone, build_vit_backbone

__all__ = [
    "InternImage",
    "MixTransformer",
    "build_beit_backbone",
    "build_bisenet_r18_backbone",
    "build_internimage_backbone",
    "build_mit_backbone",
    "build_resnet_d8_backbone",
    "build_swiftnet_r18_backbone",
    "build_timm_backbone",
    "build_vit_backbone",
]
