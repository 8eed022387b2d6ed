"""Every configuration key, its default, one line of meaning: one file per subject.

A file has ``add_keys(cfg)``; :data:`SUBJECTS` lists the files in the order they are added.
"""

from __future__ import annotations

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
    parallel,
    solver,
    test,
    the_mask,
    transfer,
)

SUBJECTS = (
    input,
    mask_former,
    the_mask,
    backbones,
    encoder,
    context,
    solver,
    test,
    inference,
    data,
    keyframe,
    memory,
    transfer,
    parallel,
)
