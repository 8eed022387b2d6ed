"""Train a model; with --eval-only, evaluate it.

the-mask train --model street-mask --data mine OUTPUT_DIR output/mine
the-mask train --config camvid/mask2former_r18_cpu OUTPUT_DIR output/camvid
torchrun --nproc-per-node 8 tools/train_net.py --config-file configs/vspw/the_mask_r50_1f.yaml
"""

from __future__ import annotations

import argparse

from the_mask.cli import _options

# ModuleNotFoundError: of a hub model.
EXPECTED = ("ModuleNotFoundError",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line; processes are counted as in Detectron2."""
    _options.model_or_config(parser)
    _options.data_option(parser)
    _options.weights_option(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint of OUTPUT_DIR")
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS (with --resume: the last checkpoint)"
    )
    _options.process_options(parser)
    parser.add_argument("--num-machines", type=int, default=1, metavar="N")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="I", help="which machine this is, from 0")
    parser.add_argument("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0; auto on one machine")
    _options.trust_option(parser)
    parser.add_argument("--allow-unsafe-yaml", action="store_true", help="open YAML that can run code")
    parser.add_argument("--allow-remote-config", action="store_true", help="let the config and its _BASE_ be URLs")
    _options.overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Train or evaluate."""
    from the_mask.engine import RunOptions, run_processes

    options = RunOptions(
        config_file=args.config_file or "",
        model=args.model,
        data=args.data,
        overrides=_options.with_weights(args),
        resume=args.resume,
        eval_only=args.eval_only,
        trust_pickle=args.trust_pickle,
        allow_unsafe_yaml=args.allow_unsafe_yaml,
        allow_remote_config=args.allow_remote_config,
    )
    run_processes(
        options,
        num_gpus=args.num_gpus,
        num_processes=args.num_processes,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
    )
