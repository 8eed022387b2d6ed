#!/usr/bin/env python3
"""Pack a trained model to ship with the library: float16 weights, config and card in the_mask/models.

Edit the card's facts and text afterwards; packing again keeps them and updates the digest.

Example:
    tools/pack_model.py --config-file configs/camvid/street_live.yaml \\
        --weights output/model_final.pth --name street-live
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import the_mask.modeling  # noqa: F401  fills the registries
from the_mask.config import load_config
from the_mask.engine import exit_code
from the_mask.models import FOLDER
from the_mask.weights.packing import pack_model


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the model: lower case letters, digits, hyphens")
    parser.add_argument("--config-file", required=True, metavar="YAML")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint; default: MODEL.WEIGHTS of the config")
    parser.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help="default: the_mask/models")
    parser.add_argument("--trust-pickle", action="store_true", help="read weights that can execute code")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return parser


def run(args: argparse.Namespace) -> None:
    """As :func:`main`, with errors as exceptions."""
    overrides = [*(["MODEL.WEIGHTS", args.weights] if args.weights else []), *args.opts]
    target = pack_model(load_config(args.config_file, overrides), args.name, args.trust_pickle, args.folder)
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB; edit {target.with_suffix('.md').name}")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
