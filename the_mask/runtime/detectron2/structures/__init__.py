"""``ImageList``."""

from .._missing import not_provided
from .image_list import ImageList

__all__ = ["ImageList"]

__getattr__ = not_provided(__name__)
