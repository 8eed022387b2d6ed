#!/usr/bin/env python3
"""Submit a training to SLURM: one job, one process per GPU, on any number of machines. Needs ``pip install submitit``.

  tools/launch_slurm.py --nodes 2 --gpus-per-node 8 --partition gpu --hours 24 -- \\
      --config-file configs/vspw/the_mask_internimage_h_video.yaml MODEL.PARALLEL fsdp2 OUTPUT_DIR output/h

What follows ``--`` are the arguments of tools/train_net.py. A job that runs out of time or is preempted is queued again
with --resume, and goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from the_mask.engine import exit_code
from the_mask.engine.slurm import SlurmOptions, submit


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("training", nargs="+", metavar="-- TRAINING", help="arguments of tools/train_net.py")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(build_parser().parse_args(argv))
    training = args.pop("training")
    return exit_code(lambda: print(submit(training, SlurmOptions(**args))), also=(ImportError,))


if __name__ == "__main__":
    raise SystemExit(main())
