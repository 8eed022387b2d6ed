"""Logging: coloured lines on the terminal of the first process, and a plain file per process."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from termcolor import colored

LOGGERS = ("the_mask", "detectron2", "fvcore")
_DATE = "%m/%d %H:%M:%S"


class _ConsoleFormatter(logging.Formatter):
    """Formats time and message; adds level and logger name only for warnings and errors."""

    def __init__(self, color: bool) -> None:
        super().__init__(datefmt=_DATE)
        self._color = color

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"[{self.formatTime(record, self.datefmt)}]"
        if self._color:
            prefix = colored(prefix, "green", force_color=True)
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            level = record.levelname
            if self._color:
                level = colored(level, "red" if record.levelno >= logging.ERROR else "yellow", force_color=True)
            text = f"{level} {text}"
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        return f"{prefix} {text}"


@contextmanager
def without_traceback(*errors: type[BaseException]) -> Iterator[None]:
    """Stop Detectron2's loop from logging tracebacks of errors that are reported in one line afterwards."""

    def wanted(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], errors))

    loop = logging.getLogger("detectron2.engine.train_loop")
    loop.addFilter(wanted)
    try:
        yield
    finally:
        loop.removeFilter(wanted)


def setup_logging(folder: str | Path | None, rank: int = 0) -> None:
    """Send the loggers of the_mask and Detectron2 to stdout (rank 0) and to ``log.txt`` / ``log.rankN.txt``.

    A second call replaces the first.

    Args:
        folder: folder of the files; ``None`` writes none.
        rank: rank of this process.
    """
    handlers: list[logging.Handler] = []
    if rank == 0:
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(_ConsoleFormatter(color=sys.stdout.isatty()))
        handlers.append(console)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = "log.txt" if rank == 0 else f"log.rank{rank}.txt"
        file = logging.FileHandler(Path(folder) / name, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt=_DATE))
        handlers.append(file)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        for old in [handler for handler in logger.handlers if getattr(handler, "of_the_mask", False)]:
            logger.removeHandler(old)
            old.close()
        logger.setLevel(logging.INFO)
        logger.propagate = False
        for handler in handlers:
            handler.of_the_mask = True  # type: ignore[attr-defined]
            logger.addHandler(handler)
