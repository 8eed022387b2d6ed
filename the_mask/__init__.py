"""the_mask: video semantic segmentation on Detectron2.

Importing this package makes ``import detectron2`` work: an installed Detectron2 is used when there is one, the
embedded runtime in ``the_mask/runtime`` otherwise. ``THE_MASK_D2=auto|real|embedded`` forces the choice.

``the_mask.load(name)`` gives a trained model that is ready for video; see :func:`the_mask.inference.load.load`.
"""

from typing import TYPE_CHECKING, Any

from the_mask._detectron2 import select_detectron2

if TYPE_CHECKING:
    from the_mask.inference.load import load as load

__version__ = "0.1.0.dev0"

select_detectron2()


def __getattr__(name: str) -> Any:
    # Only when it is asked for: torch and the models take a second to import.
    if name == "load":
        from the_mask.inference.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
