#!/usr/bin/env python
"""Train or evaluate a model.

tools/train_net.py --config-file configs/camvid/mask2former_r18_cpu.yaml OUTPUT_DIR output/camvid
torchrun --nproc-per-node 8 tools/train_net.py --config-file configs/vspw/the_mask_r50_1f.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from the_mask.engine import RunOptions, exit_code, run_processes


def build_parser() -> argparse.ArgumentParser:
    """The command line; numbers of processes as in Detectron2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="YAML", help="model and training, see configs/")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint of OUTPUT_DIR")
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS (with --resume: the last checkpoint)"
    )
    parser.add_argument("--num-gpus", type=int, default=0, metavar="N", help="processes per machine, one per GPU")
    parser.add_argument("--num-processes", type=int, default=0, metavar="N", help="processes per machine, on the CPU")
    parser.add_argument("--num-machines", type=int, default=1, metavar="N")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="I", help="which machine this is, from 0")
    parser.add_argument("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0; auto on one machine")
    parser.add_argument("--trust-pickle", action="store_true", help="open weights files that can run code (.pkl)")
    parser.add_argument("--allow-unsafe-yaml", action="store_true", help="open YAML that can run code")
    parser.add_argument("--allow-remote-config", action="store_true", help="let the config and its _BASE_ be URLs")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides, at the end")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and return the exit code."""
    args = build_parser().parse_args(arguments)
    options = RunOptions(
        config_file=args.config_file,
        overrides=args.opts,
        resume=args.resume,
        eval_only=args.eval_only,
        trust_pickle=args.trust_pickle,
        allow_unsafe_yaml=args.allow_unsafe_yaml,
        allow_remote_config=args.allow_remote_config,
    )
    return exit_code(
        lambda: run_processes(
            options,
            num_gpus=args.num_gpus,
            num_processes=args.num_processes,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
