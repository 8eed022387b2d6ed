"""Fault injection for writers of files: the n-th call that changes the disk fails or kills the process, for every n.

As in SQLite's tests, an action is repeated with a fault at its first step, then at its second, and so on until it ends
without one. A step is a call of ``open`` for writing, ``write``, ``flush``, or one of :data:`CALLS`.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import subprocess
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Steps that are functions of the module os.
CALLS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "sendfile", "truncate")
# Number of faults of each kind that this process has injected.
INJECTED: Counter[str] = Counter()


class Faults:
    """Count the steps of an action and make one of them fail.

    Attributes:
        at: number of the step, from 1.
        kill: end the process at that step instead of raising an OSError.
        steps: names of the steps so far.
    """

    def __init__(self, at: int, kill: bool = False) -> None:
        self.at = at
        self.kill = kill
        self.steps: list[str] = []

    @property
    def reached(self) -> bool:
        return len(self.steps) >= self.at

    def step(self, name: str) -> None:
        self.steps.append(name)
        if len(self.steps) != self.at:
            return
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, f"injected at step {self.at} ({name})")

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.step(name)
            return function(*args, **options)

        return call

    def opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """``open`` whose files, if they are written, count their steps too."""

        def call(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if not set(mode) & set("wxa+"):
                return real(file, mode, *args, **options)
            self.step("open")
            return _File(self, real(file, mode, *args, **options))

        return call


class _File:
    """An open file that counts its writes. A failing write stores part of the content, as on a full disk."""

    def __init__(self, faults: Faults, stream: Any) -> None:
        self._faults = faults
        self._stream = stream

    def write(self, data: Any) -> int:
        try:
            self._faults.step("write")
        except OSError:
            self._stream.write(
                memoryview(data)[: len(data) // 2] if not isinstance(data, str) else data[: len(data) // 2]
            )
            raise
        return self._stream.write(data)

    def flush(self) -> None:
        self._faults.step("flush")
        self._stream.flush()

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def injected(faults: Faults) -> Iterator[None]:
    """Inside the block, all writes of this process go through ``faults``."""
    with pytest.MonkeyPatch.context() as patch:
        opened = faults.opened(builtins.open)
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)  # pathlib's
        for name in CALLS:
            patch.setattr(os, name, faults.counted(name, getattr(os, name)))
        yield


def fail_everywhere(
    action: Callable[[Path], object],
    check: Callable[[Path, bool], None],
    prepare: Callable[[Path], object],
    root: Path,
    every: int = 1,
    expected: type[BaseException] | tuple[type[BaseException], ...] = OSError,
) -> int:
    """Run an action in fresh folders with an error at each of its steps in turn.

    Args:
        action: gets the folder; may raise ``expected`` and nothing else.
        check: gets the folder, and whether the action ended without an error.
        prepare: fills the folder before the action.
        root: where the folders are made.
        every: 1 tries all steps, n every n-th, to save time.

    Returns:
        number of steps.
    """
    for at in range(1, 1000, every):
        folder = root / f"fail{at}"
        folder.mkdir()
        prepare(folder)
        faults, done = Faults(at), False
        with injected(faults):
            try:
                action(folder)
                done = True
            except expected:
                pass
        assert done or faults.reached, "an error that nobody injected"
        INJECTED["errors"] += faults.reached
        check(folder, done)
        # Once more without a fault: nothing that the failure left may get in the way.
        action(folder)
        check(folder, True)
        if not faults.reached:
            return at - 1
    raise AssertionError("the action never ends")


def kill_everywhere(
    action: Callable[[Path], object],
    check: Callable[[Path, bool], None],
    prepare: Callable[[Path], object],
    root: Path,
    every: int = 1,
) -> int:
    """As :func:`fail_everywhere`, but SIGKILL ends the process (a fork) at the step.

    A fork inherits the locks of threads that it does not have. Actions that run models or encode videos need a process
    without threads: the mark ``alone``.
    """
    for at in range(1, 1000, every):
        folder = root / f"kill{at}"
        folder.mkdir()
        prepare(folder)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with injected(Faults(at, kill=True)):
                    action(folder)
                code = 0
            except BaseException:  # noqa: BLE001  (this process ends here)
                traceback.print_exc()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), f"at step {at} the process ended with {code}, which is neither"
        INJECTED["kills"] += code != 0
        check(folder, code == 0)
        action(folder)
        check(folder, True)
        if code == 0:
            return at - 1
    raise AssertionError("the action never ends")


LARGE = 1 << 26


def fill_everywhere(
    action: Callable[[Path], object],
    check: Callable[[Path, bool], None],
    prepare: Callable[[Path], object],
    root: Path,
    expected: type[BaseException] | tuple[type[BaseException], ...] = OSError,
    most_pages: int = 64,
) -> int:
    """As :func:`fail_everywhere`, on a small disk that fills up after some pages and is then made larger.

    Returns:
        number of pages that the action needs.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    folder = root / "disk"
    folder.mkdir()
    for pages in range(most_pages):
        problem = mount(folder, LARGE)
        if problem is not None:
            pytest.skip(problem)
        try:
            prepare(folder)
            (folder / "ballast").write_bytes(bytes(8 * page))  # a size of 0 would mean no limit
            used = (os.statvfs(folder).f_blocks - os.statvfs(folder).f_bfree) * os.statvfs(folder).f_bsize
            assert mount(folder, used + page * pages, "remount") is None
            failure = None
            try:
                action(folder)
            except expected as error:
                failure = error
                INJECTED["full disks"] += 1
            done = failure is None
            assert done or str(folder) in str(failure), f"no file is named: {failure}"
            check(folder, done)
            assert mount(folder, LARGE, "remount") is None
            action(folder)
            check(folder, True)
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        if done:
            return pages
    raise AssertionError(f"the action does not fit on {most_pages} pages")


def mount(folder: Path, size: int, *options: str) -> str | None:
    """Mount a disk in memory of ``size`` bytes at a folder; returns what went wrong, or None."""
    command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return f"no mount: {error}"
    return None if done.returncode == 0 else f"a disk cannot be mounted: {done.stderr.strip()}"
