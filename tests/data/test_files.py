"""Small files: whole or not at all, inside their folder, and named when they cannot be read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from the_mask.data import get_records
from the_mask.data.files import atomic_write, inside, read_json, read_lines, relative_name, write_json
from the_mask.data.registry import natural_key


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    atomic_write(path, b"old")

    def fail(stream: object) -> None:
        stream.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_links_are_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"keep")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    # The temporary file's name can be guessed.
    (tmp_path / f".a.{os.getpid()}.writing").symlink_to(tmp_path / "victim")
    atomic_write(tmp_path / "a", b"new")
    assert (tmp_path / "victim").read_bytes() == b"keep"
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("text", ["cam1/v", "./cam1/v", "cam1/v/", "cam1//v", "cam1/./v/."])
def test_a_path_has_one_spelling(text: str) -> None:
    assert relative_name(text) == "cam1/v"


@pytest.mark.parametrize("text", ["", ".", "./", "..", "../v", "cam1/../v", "cam1/..", "/etc/v", "a\0b"])
def test_names_that_lead_out_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="name"):
        inside(tmp_path, text, "0.png")


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/v").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"out/v/0.png is, or lies behind, a symbolic link"):
        inside(tmp_path / "out", "v", "0.png")
    # The folder itself, and links within it, are the user's own choice.
    (tmp_path / "here").symlink_to(tmp_path / "out")
    (tmp_path / "out/w").mkdir()
    (tmp_path / "out/x").symlink_to(tmp_path / "out/w")
    assert inside(tmp_path / "here", "x", "0.png") == tmp_path / "here/x/0.png"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("vidéo\n".encode("utf-16"), "UTF-16"),
        ("a\nb\n".encode("utf-16-le"), "UTF-16"),
        ("a\nvid\xe9o\n".encode("cp1252"), r"line 2: not UTF-8 text \(byte 0xe9\)"),
    ],
)
def test_other_encodings_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"train.txt.*{message}"):
        read_lines(path)


def test_lines(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("\ufeff v1 \r\n\r\nvidéo\rv3".encode())
    assert read_lines(tmp_path / "a") == ["v1", "vidéo", "v3"]


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": [1, 2]})
    assert read_json(path) == {"x": [1, 2]}
    for text, message in (
        ("{", "is not JSON"),
        ("[1]", "holds list"),
        ("[" * 100_000, "nested too deep"),
        ("", "JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"index .*a.json .*{message}"):
            read_json(path, "index")


def test_natural_order() -> None:
    assert sorted(["f10", "f9", "f²", "f①", "f1"], key=natural_key) == ["f1", "f9", "f10", "f²", "f①"]
    assert sorted(["t0.5", "t0.25", "t10.0", "t2"], key=natural_key) == ["t0.25", "t0.5", "t2", "t10.0"]
    assert sorted(["2024.10.1", "2024.9.1"], key=natural_key) == ["2024.9.1", "2024.10.1"]


def test_videos_are_known_by_their_paths(make_tree: Callable[..., str], tmp_path: Path) -> None:
    name = make_tree("paths", {"cam1/v": 2, "cam2/v": 3})
    assert [(r["video_id"], len(r["frames"])) for r in get_records(name)] == [("cam1/v", 2), ("cam2/v", 3)]
    (tmp_path / "paths/train.txt").write_text("cam1/v\n./cam2/v/\n")
    assert [r["video_id"] for r in get_records(name)] == ["cam1/v", "cam2/v"]
    (tmp_path / "paths/train.txt").write_text("cam1/v\n./cam1/v\ncam1/v/\n")
    with pytest.raises(ValueError, match="video cam1/v is listed more than once"):
        get_records(name)


@pytest.mark.parametrize("line", ["..", "../paths/data/v", "/tmp/v", "v/../../w"])
def test_lists_do_not_lead_out_of_the_data(make_tree: Callable[..., str], tmp_path: Path, line: str) -> None:
    name = make_tree("paths", {"v": 1})
    (tmp_path / "paths/train.txt").write_text(f"v\n{line}\n")
    with pytest.raises(ValueError, match=r"train.txt: video .*(leads out|absolute)"):
        get_records(name)


def test_names_of_any_length_that_can_be(tmp_path: Path) -> None:
    """What is added to a name while it is written would make it too long."""
    for name in ("x" * 249, "é" * 120, "x" * 201):
        atomic_write(tmp_path / relative_name(name), b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    assert len(os.listdir(tmp_path)) == 3
    for name in ("x" * 250, "é" * 125, "a\udcff", "a\ud800/b"):
        with pytest.raises(ValueError, match="names no file or folder"):
            relative_name(name)
