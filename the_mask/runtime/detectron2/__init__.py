"""The part of Detectron2's public interface that the_mask uses, for machines without Detectron2.

It has upstream's module layout and behaviour, and nothing beyond them: what should differ from upstream is a subclass
in ``the_mask``. A name that is not here raises an error that says how to get the real package.
"""

from ._missing import not_provided

__version__ = "0.6+themask"
__the_mask_embedded__ = True

__getattr__ = not_provided(__name__)
