"""Per-pixel heads of ``ClipSegmentor``, in Detectron2's ``SEM_SEG_HEADS_REGISTRY``."""

from the_mask.modeling.heads.base import PixelHead
from the_mask.modeling.heads.fcn import FCNHead

__all__ = ["FCNHead", "PixelHead"]
