"""Per-pixel classification: heads and context blocks on features of one or several frames, and distillation."""

from the_mask.modeling.pixel import heads as heads
from the_mask.modeling.pixel.clip_segmentor import ClipSegmentor
from the_mask.modeling.pixel.distilled import DistilledSegmentor

__all__ = ["ClipSegmentor", "DistilledSegmentor"]
