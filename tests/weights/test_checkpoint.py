"""Checkpoints under ill treatment: kills, full disks, damaged files."""

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from the_mask.data.files import remove_leftovers
from the_mask.weights.checkpoint import (
    CheckpointFolder,
    CheckpointWriteError,
    part_path,
    read_checkpoint,
    save_checkpoint,
)


def state(value: float, size: int = 1000) -> dict:
    return {"model": {"w": torch.full((size,), value)}, "iteration": int(value), "numbered": []}


def value_in(path: Path) -> float:
    return float(read_checkpoint(path)["model"]["w"][0])


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model_a.pth", state(3))
    assert value_in(tmp_path / "model_a.pth") == 3
    assert os.listdir(tmp_path) == ["model_a.pth"]


def _run_and_die(action: Callable[[], None]) -> int:
    """Run in a forked process; returns the signal that ended it (0: it ended by itself)."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * -1


def _kill_self(*args: object, **options: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", ["half written", "before fsync", "before rename", "after rename"])
def test_sigkill_at_any_moment_leaves_a_good_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    path = tmp_path / "model_a.pth"
    save_checkpoint(path, state(1))
    if moment == "half written":

        def half(content: object, stream: object) -> None:
            stream.write(b"PK" * 500)
            stream.flush()
            _kill_self()

        monkeypatch.setattr(torch, "save", half)
    elif moment == "before fsync":
        monkeypatch.setattr(os, "fsync", _kill_self)
    elif moment == "before rename":
        monkeypatch.setattr(os, "replace", _kill_self)
    else:
        real = os.replace
        monkeypatch.setattr(os, "replace", lambda *args, **options: _kill_self(real(*args, **options)))
    assert _run_and_die(lambda: save_checkpoint(path, state(2))) == signal.SIGKILL
    monkeypatch.undo()
    assert value_in(path) == (2 if moment == "after rename" else 1)
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["model_a.pth"]


@contextmanager
def _small_disk(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: the kernel refuses the write as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [100, 20_000, 39_000])
def test_full_disk(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "model_a.pth"
    save_checkpoint(path, state(1, 10_000))
    with (
        _small_disk(limit),
        pytest.raises(CheckpointWriteError, match=r"cannot write checkpoint .*model_a.pth") as info,
    ):
        save_checkpoint(path, state(2, 10_000))
    assert "MiB free" in str(info.value)
    assert "--resume" in str(info.value)
    assert "File too large" in str(info.value)
    assert value_in(path) == 1
    assert os.listdir(tmp_path) == ["model_a.pth"]


def test_missing_folder_and_read_only_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointWriteError, match="No such file"):
        save_checkpoint(tmp_path / "nowhere" / "model_a.pth", state(1))


def _folder_with_two(tmp_path: Path) -> CheckpointFolder:
    folder = CheckpointFolder(tmp_path)
    folder.save_numbered(1, state(1))
    folder.save_numbered(2, state(2))
    os.utime(tmp_path / "model_0000001.pth", (1, 1))
    return folder


def _truncate(path: Path) -> None:
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size // 2)


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes(os.urandom(3000))


def _other_content(path: Path) -> None:
    torch.save([1, 2, 3], path)


def _python_objects(path: Path) -> None:
    torch.save({"model": {}, "object": Path("x")}, path)


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit, _empty, _garbage, _other_content, _python_objects])
def test_damaged_checkpoint_names_the_next_best(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = _folder_with_two(tmp_path)
    last = folder.last()
    assert last is not None
    damage(last)
    with pytest.raises(ValueError, match=r"model_0000002.pth cannot be read: .*Next best in .*: model_0000001.pth"):
        read_checkpoint(last)


def test_missing_and_alone(tmp_path: Path) -> None:
    _folder_with_two(tmp_path)
    (tmp_path / "model_0000002.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"model_0000002.pth does not exist. Next best.*model_0000001.pth"):
        read_checkpoint(tmp_path / "model_0000002.pth")
    _empty(tmp_path / "model_0000001.pth")
    with pytest.raises(ValueError, match="No other checkpoint"):
        read_checkpoint(tmp_path / "model_0000001.pth")


def test_retention_deletes_only_its_own(tmp_path: Path) -> None:
    (tmp_path / "model_9999999.pth").write_bytes(b"of an older run")
    folder = CheckpointFolder(tmp_path, keep=2)
    for iteration in (9, 19, 29, 39):
        folder.save_numbered(iteration, state(iteration))
    folder.save_best(state(5))
    assert sorted(os.listdir(tmp_path)) == [
        "last_checkpoint",
        "model_0000029.pth",
        "model_0000039.pth",
        "model_9999999.pth",
        "model_best.pth",
    ]
    assert read_checkpoint(folder.last())["numbered"] == ["model_0000029.pth", "model_0000039.pth"]
    folder.save_final(state(40))
    assert folder.last() == tmp_path / "model_final.pth"
    assert (tmp_path / "model_0000029.pth").exists()


def test_keep_zero_keeps_all(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "new" / "folder", keep=0)
    for iteration in range(4):
        folder.save_numbered(iteration, state(iteration))
    assert len(list((tmp_path / "new" / "folder").glob("model_*.pth"))) == 4


def test_no_pointer_no_last(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path).last() is None


@pytest.mark.parametrize("pointer", ["", "  \n", None, "model_0000009.pth"], ids=["none", "blank", "missing", "gone"])
def test_without_a_pointer_the_newest_usable_one_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pointer: str | None
) -> None:
    folder = _folder_with_two(tmp_path)
    folder.save_best(state(9))
    if pointer is None:
        (tmp_path / "last_checkpoint").unlink()
    else:
        (tmp_path / "last_checkpoint").write_text(pointer)
    assert CheckpointFolder(tmp_path).last() == tmp_path / "model_0000002.pth"
    assert "taking model_0000002.pth, the newest usable checkpoint" in caplog.text
    _truncate(tmp_path / "model_0000002.pth")
    assert CheckpointFolder(tmp_path).last() == tmp_path / "model_0000001.pth"
    _garbage(tmp_path / "model_0000001.pth")
    with pytest.raises(
        ValueError, match=r"all checkpoints in its folder are damaged: model_0000001.pth, model_0000002"
    ):
        CheckpointFolder(tmp_path).last()


def test_the_pointer_stays_in_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    CheckpointFolder(run).save_numbered(1, state(1))
    save_checkpoint(tmp_path / "model_0000001.pth", state(7))
    for name in ("../model_0000001.pth", str(tmp_path / "model_0000001.pth"), "model\0.pth"):
        (run / "last_checkpoint").write_text(name)
        with pytest.raises(ValueError, match=r"last_checkpoint does not name a checkpoint in its folder"):
            CheckpointFolder(run).last()
    (run / "last_checkpoint").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"last_checkpoint does not name"):
        CheckpointFolder(run).last()


@pytest.mark.parametrize(
    "names",
    [["../precious.txt"], ["/etc/passwd"], ["precious.txt"], ["model_best.pth"], ["model_1.pth"], "x", [1], None, {}],
)
def test_a_checkpoint_cannot_name_what_is_deleted(tmp_path: Path, names: object) -> None:
    (tmp_path / "precious.txt").write_text("kept")
    folder = CheckpointFolder(tmp_path / "run", keep=1)
    with pytest.raises(ValueError, match=r"foreign.pth lists files that are no numbered checkpoints"):
        folder.take_numbered(names, Path("foreign.pth"))
    assert folder.numbered == []
    folder.take_numbered(["model_0000003.pth", "model_12345678.pth"], Path("own.pth"))
    assert len(folder.numbered) == 2


def _parts(path: Path, index: object) -> None:
    torch.save({"model": {"w": torch.empty(0)}, "parts_elsewhere": index}, path)


@pytest.mark.parametrize(
    "index",
    [
        {"count": 10**9, "paths": []},
        {"count": 0, "paths": []},
        {"count": "2", "paths": []},
        {"count": True, "paths": 3},
        {"count": 1, "paths": ["/model/w"], "token": "../../x"},
        [1],
        7,
    ],
)
def test_what_a_checkpoint_says_of_its_parts_is_bounded(tmp_path: Path, index: object) -> None:
    _parts(tmp_path / "model_a.pth", index)
    with pytest.raises(ValueError, match=r"model_a.pth: (its parts_elsewhere|the token)"):
        read_checkpoint(tmp_path / "model_a.pth")


@pytest.mark.parametrize("place", ["/model/none/x", "", 5, "/model/w/deeper", "/other"])
def test_parts_that_do_not_fit(tmp_path: Path, place: object) -> None:
    _parts(tmp_path / "model_a.pth", {"count": 1, "paths": [place]})
    save_checkpoint(part_path(tmp_path / "model_a.pth", 0, 1), {"parts": {"/model/w": torch.ones(2)}})
    with pytest.raises(ValueError, match=r"model_a.pth: its parts of .* do not fit together"):
        read_checkpoint(tmp_path / "model_a.pth")
    _parts(tmp_path / "model_a.pth", {"count": 1, "paths": ["/model/w"]})
    assert read_checkpoint(tmp_path / "model_a.pth")["model"]["w"].tolist() == [1, 1]
    _parts(tmp_path / "model_a.pth", {"count": 65536, "paths": ["/model/w"]})
    with pytest.raises(ValueError, match=r"written by 65536 processes; its part .*part0of65536: it is missing"):
        read_checkpoint(tmp_path / "model_a.pth")


def test_stale_parts_go_with_the_checkpoint_that_they_belonged_to(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    final = tmp_path / "model_final.pth"
    others = [
        tmp_path / "model_final.pth.part",
        tmp_path / "my_model_final.pth.part0of2",
        part_path(tmp_path / "x.pth", 0, 2),
    ]
    for file in (part_path(final, 0, 2), part_path(final, 1, 2, "0123abcd"), *others):
        file.write_bytes(b"")
    folder.save_final(state(1))
    assert sorted(tmp_path.glob("*part*")) == sorted(others)
    # A divided one keeps its own, whatever else is there.
    for token in ("0123abcd", "aaaaaaaa"):
        part_path(final, 0, 1, token).write_bytes(b"")
    folder.save_final({**state(1), "parts_elsewhere": {"count": 1, "paths": [], "token": "aaaaaaaa"}})
    assert sorted(tmp_path.glob("*part*")) == sorted([*others, part_path(final, 0, 1, "aaaaaaaa")])


def test_a_folder_that_was_deleted_meanwhile_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = CheckpointFolder(tmp_path / "run", keep=2)
    folder.save_numbered(1, state(1))
    shutil.rmtree(tmp_path / "run")
    folder.save_numbered(2, state(2))
    assert "run was emptied or deleted during the run: what was in it is lost" in caplog.text
    assert read_checkpoint(folder.last())["numbered"] == ["model_0000002.pth"]
