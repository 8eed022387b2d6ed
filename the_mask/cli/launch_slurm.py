"""Submit a training to SLURM.

One job, one process per GPU, on any number of machines. Needs the extra "slurm".

  the-mask launch-slurm --nodes 2 --gpus-per-node 8 --partition gpu --hours 24 -- \\
      --config-file vspw/the_mask_internimage_h_video MODEL.PARALLEL fsdp2 OUTPUT_DIR output/h

The arguments after ``--`` are those of ``the-mask train``. A job that runs out of time or is preempted is queued again
with --resume, and continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

EXPECTED = ("ImportError",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8, help="0: CPU, with --processes-per-node")
    parser.add_argument("--processes-per-node", type=int, default=0, help="default: one per GPU")
    parser.add_argument("--cpus-per-process", type=int, default=8)
    parser.add_argument("--memory-gb", type=int, default=0, help="per machine; 0: the cluster's default")
    parser.add_argument("--hours", type=float, default=24)
    parser.add_argument("--partition", default="")
    parser.add_argument("--name", default="the_mask")
    parser.add_argument("--folder", type=Path, default=Path("output/slurm"), help="logs (default: output/slurm)")
    parser.add_argument("--executor", choices=("slurm", "local", "debug"), default="slurm", help="for trying it out")
    parser.add_argument("training", nargs="+", metavar="-- TRAINING", help="arguments of `the-mask train`")


def run(args: argparse.Namespace) -> None:
    """Check the training and queue it."""
    from the_mask.engine.slurm import SlurmOptions, submit

    options = vars(args)
    training = options.pop("training")
    print(submit(training, SlurmOptions(**options)))
