"""the_mask: video semantic segmentation on Detectron2.

Importing this package makes ``import detectron2`` work: an installed Detectron2 is used when there is one, the
embedded runtime in ``the_mask/runtime`` otherwise. ``THE_MASK_D2=auto|real|embedded`` forces the choice.
"""

from the_mask._detectron2 import select_detectron2

__version__ = "0.1.0.dev0"

select_detectron2()
