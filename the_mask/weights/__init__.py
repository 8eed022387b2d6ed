"""Weights: checkpoint files, loading and converting, class sets, sharded states; from a config to a trained model."""

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
