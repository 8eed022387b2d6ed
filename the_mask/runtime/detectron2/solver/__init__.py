"""Learning rates as a factor of the base rates."""

from .._missing import not_provided
from .lr_scheduler import LRMultiplier, WarmupParamScheduler

__all__ = ["LRMultiplier", "WarmupParamScheduler"]

__getattr__ = not_provided(__name__)
