"""The usual command line and the usual event writers."""

from __future__ import annotations

import argparse
import os
import sys

from ..utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter
from ..utils.file_io import PathManager

__all__ = ["default_argument_parser", "default_writers"]

_EPILOG = """
Examples:

Run on single machine:
    $ {0} --num-gpus 8 --config-file cfg.yaml

Change some config options:
    $ {0} --config-file cfg.yaml MODEL.WEIGHTS /path/to/weight.pth SOLVER.BASE_LR 0.001

Run on multiple machines:
    (machine0)$ {0} --machine-rank 0 --num-machines 2 --dist-url <URL> [--other-flags]
    (machine1)$ {0} --machine-rank 1 --num-machines 2 --dist-url <URL> [--other-flags]
"""


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with the options that Detectron2's users know; ``opts`` takes the overrides ``KEY VALUE ...``."""
    parser = argparse.ArgumentParser(
        epilog=epilog or _EPILOG.format(sys.argv[0]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="path to config file")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint of the output folder")
    parser.add_argument("--eval-only", action="store_true", help="perform evaluation only")
    parser.add_argument("--num-gpus", type=int, default=1, help="number of gpus *per machine*")
    parser.add_argument("--num-machines", type=int, default=1, help="total number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="the rank of this machine (unique per machine)")
    # PyTorch can leave processes behind that hold a fixed port; one per user avoids clashes between users.
    port = 2**15 + 2**14 + hash(os.getuid() if sys.platform != "win32" else 1) % 2**14
    parser.add_argument(
        "--dist-url", default=f"tcp://127.0.0.1:{port}", help="where the processes of a distributed job meet"
    )
    parser.add_argument(
        "opts", default=None, nargs=argparse.REMAINDER, help="config options to change, as 'PATH.KEY VALUE' pairs"
    )
    return parser


def default_writers(output_dir: str, max_iter: int | None = None) -> list[EventWriter]:
    """Return a printer, a writer of ``output_dir/metrics.json``, and a tensorboard writer into ``output_dir``.

    Args:
        output_dir: made if it does not exist.
        max_iter: end of training, for the time left.
    """
    PathManager.mkdirs(output_dir)
    return [
        CommonMetricPrinter(max_iter),
        JSONWriter(os.path.join(output_dir, "metrics.json")),
        TensorboardXWriter(output_dir),
    ]
