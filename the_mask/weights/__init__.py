"""Weights: checkpoint files, loading, converting, class sets, sharding, and building the trained model of a config."""

from the_mask.weights.checkpoint import CheckpointFolder, CheckpointWriteError, read_checkpoint, save_checkpoint
from the_mask.weights.loading import LoadReport, load_weights
from the_mask.weights.trained import trained

__all__ = [
    "CheckpointFolder",
    "CheckpointWriteError",
    "LoadReport",
    "load_weights",
    "read_checkpoint",
    "save_checkpoint",
    "trained",
]
