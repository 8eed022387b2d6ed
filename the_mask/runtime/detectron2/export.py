"""Left out of the embedded runtime."""

from ._missing import HOW_TO_INSTALL

raise ImportError(f"{__name__} is not provided by the embedded runtime; {HOW_TO_INSTALL}", name=__name__)
