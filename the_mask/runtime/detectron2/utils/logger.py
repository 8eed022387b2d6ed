"""Loggers with colour on the terminal and one file per rank."""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from collections import Counter
from typing import IO, Any

from tabulate import tabulate
from termcolor import colored

from .file_io import PathManager

__all__ = ["create_small_table", "log_every_n", "log_every_n_seconds", "log_first_n", "setup_logger"]

_DATE = "%m/%d %H:%M:%S"


class _ColorfulFormatter(logging.Formatter):
    """Shorten the root logger's name, and colour warnings and errors."""

    def __init__(self, fmt: str, datefmt: str, root_name: str, abbrev_name: str) -> None:
        super().__init__(fmt, datefmt=datefmt)
        self._root_name = root_name + "."
        self._abbrev_name = abbrev_name + "." if abbrev_name else ""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.name = record.name.replace(self._root_name, self._abbrev_name)
        line = super().formatMessage(record)
        if record.levelno == logging.WARNING:
            return f"{colored('WARNING', 'red', attrs=['blink'])} {line}"
        if record.levelno >= logging.ERROR:
            return f"{colored('ERROR', 'red', attrs=['blink', 'underline'])} {line}"
        return line


@functools.lru_cache  # a second call with the same arguments must not print every line twice
def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "detectron2",
    abbrev_name: str | None = None,
    enable_propagation: bool = False,
    configure_stdout: bool = True,
) -> logging.Logger:
    """Set up the logger ``name`` at level DEBUG and return it.

    Args:
        output: a file ending in ``.txt`` or ``.log``, or a folder, where the file is ``log.txt``. ``None``: no file.
        distributed_rank: ranks above 0 do not print, and their file name ends in ``.rankN``.
        color: colours on the terminal.
        name: root of the logger names set up.
        abbrev_name: short form of ``name`` in printed lines; ``"d2"`` for ``"detectron2"``, else ``name``.
        enable_propagation: hand records on to the parent logger.
        configure_stdout: print to stdout.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = enable_propagation
    if abbrev_name is None:
        abbrev_name = "d2" if name == "detectron2" else name
    plain = logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt=_DATE)
    if configure_stdout and distributed_rank == 0:
        handler = logging.StreamHandler(stream=sys.stdout)
        if color:
            prefix = colored("[%(asctime)s %(name)s]: ", "green")
            handler.setFormatter(_ColorfulFormatter(prefix + "%(message)s", _DATE, name, str(abbrev_name)))
        else:
            handler.setFormatter(plain)
        _add_handler(logger, handler)
    if output is not None:
        filename = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
        if distributed_rank > 0:
            filename += f".rank{distributed_rank}"
        PathManager.mkdirs(os.path.dirname(filename))
        file_handler = logging.StreamHandler(_cached_log_stream(filename))
        file_handler.setFormatter(plain)
        _add_handler(logger, file_handler)
    return logger


def _add_handler(logger: logging.Logger, handler: logging.Handler) -> None:
    handler.setLevel(logging.DEBUG)
    logger.addHandler(handler)


@functools.lru_cache(maxsize=None)  # several loggers may write to one file  # noqa: UP033
def _cached_log_stream(filename: str) -> IO[str]:
    # One line at a time: a log that is read while training runs must not lag behind.
    return open(filename, "a", buffering=1, encoding="utf-8")


def create_small_table(small_dict: dict[str, Any]) -> str:
    """Return a table with the keys of ``small_dict`` above its values."""
    keys, values = tuple(zip(*small_dict.items(), strict=True))
    return tabulate([values], headers=keys, tablefmt="pipe", floatfmt=".3f", stralign="center", numalign="center")


def _find_caller() -> tuple[str, tuple[Any, ...]]:
    """Return the module of the first caller outside this file, and a hashable key of the calling line."""
    frame = sys._getframe(2)
    while frame:
        code = frame.f_code
        if os.path.join("utils", "logger.") not in code.co_filename:
            module = frame.f_globals["__name__"]
            return ("detectron2" if module == "__main__" else module), (code.co_filename, frame.f_lineno, code.co_name)
        assert frame.f_back is not None
        frame = frame.f_back
    raise RuntimeError("no caller outside utils/logger")


_LOG_COUNTER: Counter[Any] = Counter()
_LOG_TIMER: dict[Any, float] = {}


def log_first_n(
    lvl: int, msg: str, n: int = 1, *, name: str | None = None, key: str | tuple[str, ...] = "caller"
) -> None:
    """Log only the first ``n`` times.

    Args:
        lvl: logging level.
        msg: message.
        n: number of times.
        name: logger; the caller's module by default.
        key: what counts as the same: ``"caller"`` (the line of code), ``"message"``, or a tuple of both.
    """
    keys = (key,) if isinstance(key, str) else key
    assert len(keys) > 0
    caller_module, caller_key = _find_caller()
    hash_key: tuple[Any, ...] = ()
    if "caller" in keys:
        hash_key += caller_key
    if "message" in keys:
        hash_key += (msg,)
    _LOG_COUNTER[hash_key] += 1
    if _LOG_COUNTER[hash_key] <= n:
        logging.getLogger(name or caller_module).log(lvl, msg)


def log_every_n(lvl: int, msg: str, n: int = 1, *, name: str | None = None) -> None:
    """Log the first of every ``n`` calls from one line of code."""
    caller_module, key = _find_caller()
    _LOG_COUNTER[key] += 1
    if n == 1 or _LOG_COUNTER[key] % n == 1:
        logging.getLogger(name or caller_module).log(lvl, msg)


def log_every_n_seconds(lvl: int, msg: str, n: int = 1, *, name: str | None = None) -> None:
    """Log at most once per ``n`` seconds from one line of code."""
    caller_module, key = _find_caller()
    last = _LOG_TIMER.get(key)
    now = time.time()
    if last is None or now - last >= n:
        logging.getLogger(name or caller_module).log(lvl, msg)
        _LOG_TIMER[key] = now
