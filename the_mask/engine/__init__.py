"""Training: trainer, hooks, parameter groups, schedule, processes."""

from the_mask.engine.launch import launch
from the_mask.engine.optimizer import build_optimizer, parameter_groups
from the_mask.engine.run import RunOptions, evaluate_only, exit_code, run_processes, run_training
from the_mask.engine.schedule import WarmupPoly
from the_mask.engine.setup import setup
from the_mask.engine.signals import TrainingInterrupted
from the_mask.engine.trainer import Trainer
from the_mask.engine.two_stage import evaluate_branches, train_stage, train_two_stage

__all__ = [
    "RunOptions",
    "Trainer",
    "TrainingInterrupted",
    "WarmupPoly",
    "build_optimizer",
    "evaluate_branches",
    "evaluate_only",
    "exit_code",
    "launch",
    "parameter_groups",
    "run_processes",
    "run_training",
    "setup",
    "train_stage",
    "train_two_stage",
]
