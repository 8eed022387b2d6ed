"""Checkpoints."""

from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer

from .._missing import not_provided
from .detection_checkpoint import DetectionCheckpointer

__all__ = ["Checkpointer", "DetectionCheckpointer", "PeriodicCheckpointer"]

__getattr__ = not_provided(__name__)
