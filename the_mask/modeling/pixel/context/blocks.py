"""Importing this module registers all context blocks. Add the module of a new block here."""

from the_mask.modeling.pixel.context import class_memory_block as class_memory_block
from the_mask.modeling.pixel.context import criss_cross as criss_cross
from the_mask.modeling.pixel.context import dense as dense
from the_mask.modeling.pixel.context import image_blocks as image_blocks
from the_mask.modeling.pixel.context.registry import CONTEXT_BLOCKS

__all__ = ["CONTEXT_BLOCKS"]
