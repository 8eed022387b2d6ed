"""Weights of other programs to this project's names; see :mod:`the_mask.engine.converters.convert`."""

from the_mask.engine.converters.convert import FAMILIES, Conversion, UnknownLayoutError, check, convert

__all__ = ["FAMILIES", "Conversion", "UnknownLayoutError", "check", "convert"]
