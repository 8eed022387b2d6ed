"""the_mask: video semantic segmentation on Detectron2.

Importing this package makes ``import detectron2`` work: an installed Detectron2 is used when there is one, the
embedded runtime in ``the_mask/runtime`` otherwise. ``THE_MASK_D2=auto|real|embedded`` forces the choice.

``the_mask.load(name)`` loads a trained model, ready for video; see :func:`the_mask.inference.load.load`.
``the_mask.from_pretrained`` does so with the revision and the token of a hub model. ``the_mask.save_pretrained`` writes
a model as a folder, ``the_mask.push_to_hub`` uploads it to the Hugging Face hub; see
:mod:`the_mask.weights.pretrained`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from the_mask._detectron2 import select_detectron2

if TYPE_CHECKING:
    from the_mask.inference.load import from_pretrained as from_pretrained
    from the_mask.inference.load import load as load
    from the_mask.weights.pretrained import push_to_hub as push_to_hub
    from the_mask.weights.pretrained import save_pretrained as save_pretrained

__version__ = "0.1.0.dev0"

select_detectron2()


# Imported on demand, because torch and the models take a second to import.
_HOMES = {
    "from_pretrained": "the_mask.inference.load",
    "load": "the_mask.inference.load",
    "push_to_hub": "the_mask.weights.pretrained",
    "save_pretrained": "the_mask.weights.pretrained",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
