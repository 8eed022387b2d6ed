"""Convert published weights to this project's names.

The family is recognised by the names in the file; --from only checks it. No code in the file is executed unless --trust
is given. Used, ignored and missing tensors are printed; if an expected tensor is missing, nothing is written and the
exit status is 1. Converting a converted file changes nothing. See docs/weights.md.

  the-mask convert model_final_500878.pkl m2f_r50.safetensors
  the-mask convert mit_b2.pth mit_b2.safetensors --from segformer
  the-mask convert eomt.bin eomt.safetensors --base dinov3_vitl16.safetensors
  the-mask convert model_final.pth folder --to-huggingface --config-file configs/vspw/videomt_l.yaml
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("source", type=Path, metavar="IN", help=".pth, .pkl, .bin or .safetensors")
    parser.add_argument("target", type=Path, metavar="OUT", help=".safetensors or .pth")
    parser.add_argument("--from", dest="family", default="", metavar="FORMAT", help="one of docs/weights.md")
    parser.add_argument("--trust", action="store_true", help="allow files that can run code when they are opened")
    parser.add_argument(
        "--config-file",
        "--config",
        type=Path,
        metavar="YAML",
        help="also compare with this model, name by name and shape by shape",
    )
    parser.add_argument(
        "--write-config",
        type=Path,
        metavar="YAML",
        help="write a config, based on --config-file, with these weights and the keys to compute as the release does",
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="FILE",
        help="original weights of the encoder, for a file with changes to them (EoMT on DINOv3)",
    )
    parser.add_argument(
        "--to-huggingface",
        action="store_true",
        help="write OUT as a folder for transformers (EoMT, VidEoMT, EoMT-DINOv3); needs --config-file",
    )


def run(args: argparse.Namespace) -> None:
    """Convert and print a report."""
    from the_mask.weights.converters.files import convert_file, write_huggingface

    if args.to_huggingface:
        print(write_huggingface(args.source, args.target, args.config_file, args.trust))
    else:
        files = (args.config_file, args.write_config, args.base)
        print(convert_file(args.source, args.target, args.family, args.trust, *files))
    print(f"written: {args.target}")
