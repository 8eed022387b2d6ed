"""Converts weights of other programs to this project's names; see :mod:`the_mask.weights.converters.convert`."""

from the_mask.weights.converters.convert import FAMILIES, Conversion, UnknownLayoutError, check, convert

__all__ = ["FAMILIES", "Conversion", "UnknownLayoutError", "check", "convert"]
