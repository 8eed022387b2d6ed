"""Networks that refine a predicted mask, guided by its picture."""

from the_mask.modeling.refiners.cascade_psp import CascadePSP
from the_mask.modeling.refiners.losses import cascade_losses
from the_mask.modeling.refiners.registry import REFINERS, build_refiner

__all__ = ["REFINERS", "CascadePSP", "build_refiner", "cascade_losses"]
