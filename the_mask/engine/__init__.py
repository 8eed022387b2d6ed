"""The engine: trainer, hooks, parameter groups, schedule, checkpoints, weights, processes."""

from the_mask.engine.checkpoint import CheckpointFolder, CheckpointWriteError, read_checkpoint, save_checkpoint
from the_mask.engine.launch import launch
from the_mask.engine.optimizer import build_optimizer, parameter_groups
from the_mask.engine.run import RunOptions, evaluate_only, exit_code, run_processes, run_training
from the_mask.engine.schedule import WarmupPoly
from the_mask.engine.setup import setup
from the_mask.engine.signals import TrainingInterrupted
from the_mask.engine.trainer import Trainer
from the_mask.engine.two_stage import evaluate_branches, train_two_stage
from the_mask.engine.validate import validate
from the_mask.engine.weights import LoadReport, load_weights

__all__ = [
    "CheckpointFolder",
    "CheckpointWriteError",
    "LoadReport",
    "RunOptions",
    "Trainer",
    "TrainingInterrupted",
    "WarmupPoly",
    "build_optimizer",
    "evaluate_branches",
    "evaluate_only",
    "exit_code",
    "launch",
    "load_weights",
    "parameter_groups",
    "read_checkpoint",
    "run_processes",
    "run_training",
    "save_checkpoint",
    "setup",
    "train_two_stage",
    "validate",
]
