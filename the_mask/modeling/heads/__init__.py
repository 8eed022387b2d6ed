"""Per-pixel heads of ``ClipSegmentor``, in Detectron2's ``SEM_SEG_HEADS_REGISTRY``."""

from the_mask.modeling.context import blocks as blocks
from the_mask.modeling.heads.base import PixelHead
from the_mask.modeling.heads.context_head import ContextHead
from the_mask.modeling.heads.fcn import FCNHead
from the_mask.modeling.heads.upernet import UperNetHead

__all__ = ["ContextHead", "FCNHead", "PixelHead", "UperNetHead"]
