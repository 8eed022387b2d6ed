"""Finds the shell blocks of the documentation, splits them into commands, and checks a command without running it."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from the_mask import cli
from the_mask.config import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "configs" / "README.md",
    ROOT / "datasets" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "the_mask" / "models").glob("*.md")),
)
# What a fence may say it holds. "text" is shown only: folder trees, messages, forms of a record.
LANGUAGES = {"bash", "json", "python", "text", "yaml"}
_FENCE = re.compile(r"^```(?P<language>[^\n]*)\n(?P<body>.*?)^```[^\S\n]*$", re.DOTALL | re.MULTILINE)
# Made by users, or by commands of this kind on another page.
_MADE = re.compile(r"(^|/)output/|^demo/|^mine/")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    body: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a block: its words, without variables before it and without a comment."""

    place: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"


def blocks(*languages: str) -> list[Block]:
    """All fenced blocks of the pages; with arguments, those of some languages."""
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(path.relative_to(ROOT).as_posix(), line, match["language"].strip(), match["body"]))
    return [block for block in found if not languages or block.language in languages]


def commands(block: Block) -> Iterator[Command]:
    """The commands of a shell block."""
    lines = block.body.replace("\\\n", "  ").splitlines()
    for number, line in enumerate(lines, block.line + 1):
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
                words = words[1:]
            if words:
                yield Command(f"{block.page}:{number}", tuple(words))


def page_commands(page: str) -> list[Command]:
    """All commands of a page, in order."""
    return [command for block in blocks("bash") if block.page == page for command in commands(block)]


class Parsed(Exception):
    """Raised by a script's parser in place of running the script."""


def script_and_arguments(command: Command) -> tuple[str, list[str]] | None:
    """The name after ``the-mask``, or the path of a script of the source tree, and its arguments; None for neither."""
    program, *words = command.words
    if Path(program).name == "the-mask":
        return words[0], words[1:]
    if Path(program).name in ("python", "python3") and words and words[0].endswith(".py"):
        program, *words = words
    return (program, words) if program.endswith(".py") else None


def check(command: Command) -> None:
    """Raise if a command cannot work as it is written: unknown program, target, option, config or config key."""
    program, *words = command.words
    script = script_and_arguments(command)
    if script is not None:
        check_arguments(*script)
        return
    known = {"make": check_make, "pip": check_pip, "pytest": check_pytest, "python": check_module}
    name = Path(program).name.rstrip("3")
    if name in known:
        known[name](words)
    elif program == "torchrun":
        at = next(number for number, word in enumerate(words) if word.endswith(".py"))
        check_arguments(words[at], words[at + 1 :])
    elif program == "git":
        assert words[0] == "clone", words
    elif program not in ("cd", "export", "source"):
        raise AssertionError(f"nothing knows how to check {program}")


def check_arguments(script: str, arguments: list[str]) -> None:
    """Parse with the command's or script's own parser, then resolve the configs and overrides that it was given."""
    if script.endswith(".py"):
        args = parse_script(ROOT / script, arguments)
    else:
        assert script in [*cli.command_names(), "--help", "--version"], f"unknown command {script}"
        if script.startswith("-"):
            return
        args = cli.parse(cli.load_command(script), arguments)
    options = vars(args)
    config = next((options[key] for key in ("config_file", "config") if options.get(key)), None)
    overrides = list(options.get("opts") or [])
    inputs = [value for key, value in options.items() if not key.startswith(("write", "output", "target"))]
    configs = [value for value in flat(inputs) if value.endswith(".yaml") and not _MADE.search(value)]
    if config is not None and not _MADE.search(str(config)):
        configs.append(str(config))
    for name in configs:
        load_config(name)
    load_config(config if str(config) in configs else None, overrides)


def parse_script(path: Path, arguments: list[str]) -> argparse.Namespace:
    """What a script of the source tree reads from its arguments; its main function goes no further."""
    assert path.is_file(), path
    parsed: list[argparse.Namespace] = []

    def parse_args(self: argparse.ArgumentParser, args=None, namespace=None) -> None:
        words = sys.argv[1:] if args is None else args
        namespace, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {unknown}")
        parsed.append(namespace)
        raise Parsed

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args),
        mock.patch.object(argparse.ArgumentParser, "parse_intermixed_args", parse_args),
        mock.patch.object(sys, "argv", [path.name, *arguments]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        pytest.raises(Parsed),
    ):
        runpy.run_path(str(path))["main"]()
    return parsed[0]


def flat(values: object) -> Iterator[str]:
    """The texts and paths among values, and those in their lists."""
    for value in values if isinstance(values, list | tuple) or hasattr(values, "__iter__") else ():
        if isinstance(value, str | Path):
            yield str(value)
        elif isinstance(value, list | tuple):
            yield from flat(value)


def check_make(words: list[str]) -> None:
    """Targets exist in the Makefile, variables are used there."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, equals, _ = word.partition("=")
        assert re.search(rf"\$\({name}\)" if equals else rf"^{name}:", makefile, re.MULTILINE), word


def check_pip(words: list[str]) -> None:
    """``pip install``: extras are in pyproject.toml, wheels have this version."""
    assert words[0] == "install", words
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for word in words[1:]:
        for extra in re.findall(r"\[([^\]]*)\]", word):
            for name in extra.split(","):
                assert re.search(rf"^{name} = \[", metadata, re.MULTILINE), word


def check_pytest(words: list[str]) -> None:
    """Paths and markers exist."""
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for word in words:
        if not word.startswith("-"):
            assert (ROOT / word).exists() or f'"{word}: ' in metadata, word


def check_module(words: list[str]) -> None:
    """``python -m``: a module of the library, or venv."""
    assert words[0] == "-m", words
    place = ROOT / words[1].replace(".", "/")
    assert words[1] == "venv" or place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), words
