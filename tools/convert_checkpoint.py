#!/usr/bin/env python3
"""Convert published weights to this project's names. See docs/weights.md.

The family is recognised by the names in the file; --from only checks it. Nothing in the file is executed unless
--trust is given. What was used, ignored and missing is printed; if anything expected is missing nothing is written
and the exit status is 1. Converting a converted file changes nothing.

  tools/convert_checkpoint.py model_final_500878.pkl m2f_r50.safetensors
  tools/convert_checkpoint.py mit_b2.pth mit_b2.safetensors --from segformer
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from the_mask.engine import exit_code
from the_mask.weights.converters import FAMILIES
from the_mask.weights.converters.files import convert_file


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN", help=".pth, .pkl, .bin or .safetensors")
    parser.add_argument("target", type=Path, metavar="OUT", help=".safetensors or .pth")
    parser.add_argument("--from", dest="family", default="", metavar="FORMAT", help=", ".join(FAMILIES))
    parser.add_argument("--trust", action="store_true", help="allow files that can run code when they are opened")
    parser.add_argument(
        "--config-file", type=Path, metavar="YAML", help="also compare with this model, name by name and shape by shape"
    )
    parser.add_argument(
        "--write-config",
        type=Path,
        metavar="YAML",
        help="write a config, based on --config-file, with the result and the keys under which it computes as released",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)

    def run() -> None:
        print(convert_file(args.source, args.target, args.family, args.trust, args.config_file, args.write_config))
        print(f"written: {args.target}")

    return exit_code(run)


if __name__ == "__main__":
    raise SystemExit(main())
