"""Options shared by several subcommands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

# Copied from the_mask.inference.runtimes, which imports torch; a test compares them.
BACKENDS = ("auto", "eager", "compile", "onnxruntime", "openvino")
PRECISIONS = ("float32", "bfloat16", "int8")
CONFIG_HELP = "a YAML file, or the name of a config that comes with the library (see `the-mask models --configs`)"

MODEL_HELP = "a trained model: of `the-mask models`, a folder, or owner/name of the Hugging Face hub"


def config_option(parser: argparse._ActionsContainer, required: bool = True, help: str = CONFIG_HELP) -> None:
    """``--config NAME``, or ``--config-file`` as in Detectron2."""
    parser.add_argument("--config-file", "--config", required=required, metavar="YAML", help=help)


def model_or_config(parser: argparse.ArgumentParser) -> None:
    """``--config NAME``, or ``--model NAME`` in its place."""
    group = parser.add_mutually_exclusive_group(required=True)
    config_option(group, required=False)
    model_option(group)


def model_option(parser: argparse._ActionsContainer) -> None:
    """``--model NAME``: a trained model, config and weights."""
    parser.add_argument("--model", default="", metavar="NAME", help=MODEL_HELP)


def data_option(parser: argparse._ActionsContainer) -> None:
    """``--data DIR``: an imported data set."""
    parser.add_argument(
        "--data",
        default="",
        metavar="DIR",
        help="folder that `the-mask import` has written, in place of the config's data sets",
    )


def weights_option(parser: argparse._ActionsContainer) -> None:
    """``--weights FILE``: short for MODEL.WEIGHTS."""
    parser.add_argument(
        "--weights", metavar="FILE", help="checkpoint, or a model's name; default: MODEL.WEIGHTS of the config"
    )


def trust_option(parser: argparse._ActionsContainer) -> None:
    """``--trust-pickle``."""
    parser.add_argument("--trust-pickle", action="store_true", help="open weights files that can run code (.pkl)")


def import_option(parser: argparse._ActionsContainer) -> None:
    """``--import MODULE``, any number of times: what registers a data set."""
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="module or .py file that registers the data set, as in DATASETS.IMPORT; may be repeated",
    )


def process_options(parser: argparse._ActionsContainer) -> None:
    """``--num-gpus`` and ``--num-processes``, counted as in Detectron2."""
    parser.add_argument("--num-gpus", type=int, default=0, metavar="N", help="processes per machine, one per GPU")
    parser.add_argument("--num-processes", type=int, default=0, metavar="N", help="processes per machine, on the CPU")


def runtime_options(parser: argparse._ActionsContainer) -> None:
    """``--backend``, ``--precision`` and ``--calibrate`` of the networks."""
    parser.add_argument(
        "--backend",
        default="eager",
        choices=BACKENDS,
        help="what runs the networks on a CPU: PyTorch (eager), or the fastest that is installed (auto)",
    )
    parser.add_argument("--precision", default="float32", choices=PRECISIONS, help="of the networks (default: float32)")
    parser.add_argument(
        "--calibrate", metavar="PATH", help="of int8: video or folder of frames like those to come, for its ranges"
    )


def use_backend(
    args: argparse.Namespace, segmentor: Any, classes: Sequence[str] = (), size: tuple[int, int] | None = None
) -> Any:
    """Run a stream's networks in the chosen runtime; returns its report, or None for plain PyTorch.

    ``classes`` and ``size`` are those of :func:`the_mask.inference.runtimes.prepare_stream`.
    """
    from the_mask.inference.runtimes import prepare_stream

    return prepare_stream(segmentor, args.backend, args.precision, args.calibrate, classes, size)


def overrides(parser: argparse.ArgumentParser) -> None:
    """``KEY VALUE ...`` anywhere between the options."""
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides, e.g. MODEL.DEVICE cpu")


def with_weights(args: argparse.Namespace) -> list[str]:
    """The overrides of a command line, including ``--weights``."""
    return [*(["MODEL.WEIGHTS", args.weights] if args.weights else []), *args.opts]


def frame_size(text: str) -> tuple[int, int]:
    """Height and width from ``HxW``.

    Raises:
        ValueError: another form, or a zero.
    """
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"--size {text}: expected HEIGHTxWIDTH in pixels, at least 1x1, e.g. 480x853")
    return int(height), int(width)
