"""Per-pixel heads of ``ClipSegmentor``, in Detectron2's ``SEM_SEG_HEADS_REGISTRY``."""

from the_mask.modeling.pixel.context import blocks as blocks
from the_mask.modeling.pixel.heads.base import PixelHead
from the_mask.modeling.pixel.heads.bisenet import BiSeNetHead
from the_mask.modeling.pixel.heads.context_head import ContextHead
from the_mask.modeling.pixel.heads.fcn import FCNHead
from the_mask.modeling.pixel.heads.swiftnet import SwiftNetHead
from the_mask.modeling.pixel.heads.upernet import UperNetHead

__all__ = ["BiSeNetHead", "ContextHead", "FCNHead", "PixelHead", "SwiftNetHead", "UperNetHead"]
