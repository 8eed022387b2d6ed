"""Folders that appear complete, and what killed processes leave behind."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from the_mask.data.files import atomic_write
from the_mask.data.whole_folder import lock_folder, whole_folder

KILLED = """
import os, signal, sys
from pathlib import Path

from the_mask.data.whole_folder import whole_folder

rename = os.rename

def renamed(source, target, **options):
    if str(target).endswith(sys.argv[2]) and "partial" in str(source):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(source, target, **options)

os.rename, os.sync = renamed, lambda: None
with whole_folder(Path(sys.argv[1])) as partial:
    (partial / "new").touch()
    if sys.argv[2] == "early":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip os.sync."""
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture(scope="module")
def gone() -> int:
    """The id of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def make(folder: Path, name: str) -> None:
    """Make a folder of one empty file."""
    with whole_folder(folder) as partial:
        (partial / name).touch()


def killed(folder: Path, when: str) -> None:
    """Make a folder in a process that is killed before the last rename, or "early"."""
    assert subprocess.run([sys.executable, "-c", KILLED, str(folder), when]).returncode == -signal.SIGKILL


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "made"

    def fill(text: str, fail: bool = False) -> None:
        with whole_folder(folder) as partial:
            (partial / "sub").mkdir()
            atomic_write(partial / "sub" / "a", text.encode(), durable=False)
            assert folder.exists() == bool(list(tmp_path.glob("made")))
            if fail:
                raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        fill("x", fail=True)
    assert os.listdir(tmp_path) == []
    fill("one")
    (folder / "left").touch()
    with pytest.raises(ValueError, match="no more"):
        fill("x", fail=True)
    assert (folder / "sub" / "a").read_text() == "one"
    fill("two")
    assert os.listdir(tmp_path) == ["made"]
    assert os.listdir(folder) == ["sub"]
    assert (folder / "sub" / "a").read_text() == "two"
    # Files reach the disk before the folder gets its name.
    calls = []
    rename = Path.rename
    monkeypatch.setattr(os, "sync", lambda: calls.append("sync"))
    monkeypatch.setattr(Path, "rename", lambda path, to: (calls.append(to.name), rename(path, to))[1])
    fill("three")
    assert calls == ["sync", f"made.old-{os.getpid()}", "made"]
    monkeypatch.chdir(folder)
    with whole_folder(Path(".")) as partial:
        (partial / "here").touch()
    assert os.listdir(folder) == ["here"]


def test_a_new_folder_replaces_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    other = tmp_path / "made.partial-1"  # that of a process in another container
    other.mkdir()
    lock = lock_folder(other)
    assert lock is not None
    with pytest.raises(FileExistsError, match="is being made by another process"), whole_folder(folder, new=True):
        pass
    os.close(lock)

    def fill() -> None:
        with whole_folder(folder, new=True):
            folder.mkdir()
            (folder / "of another").touch()

    with pytest.raises(FileExistsError, match="is there already and not empty"):
        fill()
    assert os.listdir(folder) == ["of another"]


def test_the_next_run_removes_what_a_killed_one_has_left(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    killed(folder, "early")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("made.partial-")
    make(folder, "x")
    assert os.listdir(tmp_path) == ["made"]


def test_a_folder_that_was_being_replaced_comes_back(
    tmp_path: Path, gone: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The process is killed between the two renames; after the next one failed, the older folder exists again."""
    folder = tmp_path / "made"
    make(folder, "first")
    killed(folder, "made")
    assert not folder.exists()
    with caplog.at_level(logging.WARNING), pytest.raises(ZeroDivisionError), whole_folder(folder):
        1 / 0  # noqa: B018
    assert "made is back" in caplog.text
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["made", "made/first"]
    # Killed after them: there is nothing to bring back.
    (tmp_path / f"made.old-{gone}").mkdir()
    make(folder, "second")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["made", "made/second"]


def test_an_error_between_the_renames_keeps_the_older_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename = tmp_path / "made", Path.rename
    make(folder, "first")

    def fail(path: Path, target: Path) -> Path:
        if "partial" in path.name:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        make(folder, "second")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["made", "made/first"]


def test_only_what_is_abandoned_is_removed(tmp_path: Path, gone: int) -> None:
    """A process in a container may have any id, also ours; whoever works on a folder holds it."""
    folder, other = tmp_path / "made", tmp_path / "other"
    other.mkdir()
    (other / "precious").touch()
    (tmp_path / "made.partial-1").mkdir()  # runs, and is another user's
    (tmp_path / f"made.partial-{os.getppid()}").mkdir(exist_ok=True)
    (tmp_path / f"made.partial-{gone}0000000000000000000").mkdir()
    (tmp_path / f"made.partial-{gone}.x").mkdir()
    (tmp_path / f"xmade.partial-{gone}").mkdir()
    (tmp_path / f"made2.partial-{gone}").mkdir()
    (tmp_path / f"made.old-{gone}").symlink_to(other)
    (tmp_path / f"made.partial-{gone}").touch()
    kept = set(os.listdir(tmp_path))
    (tmp_path / f"made.partial-{os.getpid()}").mkdir()
    make(folder, "x")
    assert set(os.listdir(tmp_path)) == {*kept, "made"}
    assert os.listdir(other) == ["precious"]


def test_a_folder_in_use_is_left_alone(tmp_path: Path, gone: int) -> None:
    held = tmp_path / f"made.partial-{gone}"
    held.mkdir()
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    make(tmp_path / "made", "x")
    assert held.is_dir()
    os.close(descriptor)
    make(tmp_path / "made", "x")
    assert not held.exists()
    with (
        whole_folder(tmp_path / "made") as partial,
        pytest.raises(FileExistsError, match=r"made\.partial"),
        whole_folder(tmp_path / "made"),
    ):
        pass
    assert not partial.exists()
    assert os.listdir(tmp_path / "made") == []
