"""The command ``the-mask``. Every module in this folder is a subcommand of the same name (without "_" at the end).

A subcommand has a docstring (its first line is shown by ``the-mask --help``), ``add_arguments(parser)`` and
``run(args)``, which raises errors and returns an exit code or None. Optional: ``EXPECTED``, names of further errors
that are shown without a traceback. At the top it imports only the standard library, so that ``--help`` is fast; a test
checks this. Modules whose names begin with "_" are not subcommands.
The scripts ``tools/*.py`` call the same functions: ``main = door("train")``.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import importlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import the_mask

FOLDER = Path(__file__).resolve().parent
USAGE = """the-mask COMMAND ...

Video semantic segmentation: train, evaluate, segment video.

commands:
{commands}

`the-mask COMMAND --help` explains one; `the-mask --version` prints the version.
"""


def command_names() -> list[str]:
    """Names of all subcommands, sorted."""
    modules = (path.stem for path in FOLDER.glob("[a-z]*.py"))
    return sorted(name.rstrip("_").replace("_", "-") for name in modules)


def main(argv: Sequence[str] | None = None) -> int:
    """Main function of ``the-mask``; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"the_mask {the_mask.__version__}")
        return 0
    if words[0] not in command_names():
        import difflib

        close = difflib.get_close_matches(words[0], command_names(), n=3)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        print(f"error: unknown command {words[0]!r}; {hint}`the-mask --help` lists them", file=sys.stderr)
        return 2
    return run_command(words[0], words[1:], f"the-mask {words[0]}")


def door(name: str, **variant: bool) -> Callable[..., int]:
    """The main function of a script that runs a subcommand.

    Args:
        name: name of the subcommand.
        variant: further arguments of its ``add_arguments``, for a script with a different command line.
    """

    def run(argv: Sequence[str] | None = None) -> int:
        return run_command(name, argv, None, **variant)

    return run


def run_command(name: str, argv: Sequence[str] | None = None, prog: str | None = None, **variant: bool) -> int:
    """Parse a subcommand's arguments and run it; returns the exit code: 1 with a plain message after a user error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files need not be characters that can be printed here.
            stream.reconfigure(errors="backslashreplace")
    command = load_command(name)
    args = parse(command, argv, prog, **variant)
    # Imported here, because it imports torch.
    from the_mask.engine import exit_code

    returned: list[int] = []
    expected = tuple(getattr(builtins, error) for error in getattr(command, "EXPECTED", ()))
    status = exit_code(lambda: returned.append(command.run(args) or 0), also=expected)
    return status or returned[0]


def load_command(name: str) -> ModuleType:
    """The module of a subcommand."""
    module = name.replace("-", "_")
    return importlib.import_module(f"the_mask.cli.{module}" + ("" if (FOLDER / f"{module}.py").is_file() else "_"))


def parse(
    command: ModuleType, argv: Sequence[str] | None, prog: str | None = None, **variant: bool
) -> argparse.Namespace:
    """Parse arguments. Config overrides may be mixed with options, unless they take all remaining arguments.

    Detectron2's scripts take everything after the first override for overrides; here ``KEY VALUE --resume`` works, too.
    """
    assert command.__doc__ is not None
    parser = argparse.ArgumentParser(
        prog, description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_arguments(parser, **variant)
    # As from Python 3.14 on: before, -1e-3 and -.5 are taken for options.
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    # argparse cannot mix arguments on both sides of "--".
    words = sys.argv[1:] if argv is None else argv
    rest = "--" in words or any(action.nargs == argparse.REMAINDER for action in parser._actions)
    return parser.parse_args(argv) if rest else parser.parse_intermixed_args(argv)


def usage() -> str:
    """The text of ``the-mask --help``, from the first lines of the subcommands' docstrings, without importing them."""
    lines = []
    for name in command_names():
        path = FOLDER / f"{name.replace('-', '_')}.py"
        path = path if path.is_file() else path.with_name(f"{path.stem}_.py")
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:<20}{docstring.splitlines()[0]}")
    return "usage: " + USAGE.format(commands="\n".join(lines))
