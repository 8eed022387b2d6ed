"""UperNet and FCN auxiliary heads."""

from __future__ import annotations

from the_mask.engine.converters.parts import Part

HEADS: tuple[Part, ...] = ()
AUXILIARY: tuple[Part, ...] = ()
