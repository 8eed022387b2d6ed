"""Configuration: ``CfgNode``, the defaults, and ``@configurable``."""

from .._missing import not_provided
from .config import CfgNode, configurable, get_cfg, global_cfg, set_global_cfg

__all__ = ["CfgNode", "configurable", "get_cfg", "global_cfg", "set_global_cfg"]

__getattr__ = not_provided(__name__)
