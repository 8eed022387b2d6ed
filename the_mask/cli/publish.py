"""Write a trained model as a folder with a card, or upload it to the hub.

  the-mask publish --config camvid/mask2former_r18_cpu --weights output/camvid/model_final.pth my-model
  # edit my-model/README.md: what it is for, what it was trained on, what it fails at, licence
  the-mask publish my-model --push owner/my-model

the_mask.load and `the-mask segment --model` take the folder or owner/my-model. Uploading needs
`pip install "the_mask[hub]"` and `hf auth login`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from the_mask.cli import _options

EXPECTED = ("ModuleNotFoundError",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("folder", type=Path, help="folder of the model; its last part is the model's name")
    _options.config_option(parser, required=False, help="write the folder from this config, by path or name")
    _options.weights_option(parser)
    parser.add_argument("--half", action="store_true", help="store matrices and kernels in float16")
    parser.add_argument(
        "--license", metavar="ID", help="licence for the card, e.g. apache-2.0; consider that of the data"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to the hub")
    parser.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    _options.trust_option(parser)
    _options.overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Write, upload, or both."""
    from the_mask.config import load_config
    from the_mask.weights.pretrained import CARD, push_to_hub, save_pretrained

    if args.config_file is None and args.push is None:
        raise ValueError("nothing to do: --config writes the folder, --push sends it")
    if args.config_file is None and (args.weights or args.opts or args.half or args.license):
        raise ValueError("--weights, --half, --license and overrides go with --config")
    if args.config_file is not None:
        cfg = load_config(args.config_file, _options.with_weights(args))
        facts = {"license": args.license} if args.license else {}
        save_pretrained(cfg, args.folder, facts, halve=args.half, trust_pickle=args.trust_pickle)
        print(f"{args.folder}: written; {args.folder / CARD} is yours to edit")
    if args.push is not None:
        print(push_to_hub(args.folder, args.push, private=not args.public))
