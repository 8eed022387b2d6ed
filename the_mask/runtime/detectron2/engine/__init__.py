"""The training loop, its hooks, and the start of processes."""

from .._missing import not_provided
from . import hooks
from .defaults import default_argument_parser, default_writers
from .launch import DEFAULT_TIMEOUT, launch
from .train_loop import HookBase, SimpleTrainer, TrainerBase

__all__ = [
    "DEFAULT_TIMEOUT",
    "HookBase",
    "SimpleTrainer",
    "TrainerBase",
    "default_argument_parser",
    "default_writers",
    "hooks",
    "launch",
]

__getattr__ = not_provided(__name__)
