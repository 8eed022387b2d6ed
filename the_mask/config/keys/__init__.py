"""Every configuration key with its default, what is allowed and one line of meaning: one file per subject.

The classes are what the parts of the library read (:mod:`the_mask.config.options`). They are here and not next to those
parts, since importing these would import every model: a config needs none of them.
"""

from __future__ import annotations

import inspect
from types import ModuleType

from the_mask.config.keys import (
    backbones,
    context,
    data,
    encoder,
    inference,
    input,
    keyframe,
    mask_former,
    memory,
    model,
    solver,
    test,
)
from the_mask.config.options import Options

SUBJECTS = (
    model,
    input,
    mask_former,
    backbones,
    encoder,
    context,
    solver,
    test,
    inference,
    data,
    keyframe,
    memory,
)


def subject_options(subject: ModuleType) -> list[type[Options]]:
    """The options that a file declares, in order."""
    found = [value for value in vars(subject).values() if inspect.isclass(value) and issubclass(value, Options)]
    return [cls for cls in found if cls.__module__ == subject.__name__]
