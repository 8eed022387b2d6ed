"""Malicious files: each is refused within limits of time and memory, by an error that names it."""

from __future__ import annotations

import io
import itertools
import json
import os
import resource
import struct
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from the_mask.config import load_config, strict_yaml
from the_mask.config.strict_yaml import parse_yaml
from the_mask.data.classes import ClassList, make_class_list
from the_mask.data.files import inside, write_inside
from the_mask.data.importers import import_dataset
from the_mask.data.importers.writer import unpack
from the_mask.data.io import exif_orientation, read_image
from the_mask.data.tensor_files import read_tensors
from the_mask.engine.trackers import known_runs
from the_mask.engine.writers import prepare_metrics_file
from the_mask.evaluation.claims import claim_folder
from the_mask.inference.mask_generators import StoredMasks
from the_mask.inference.runtimes.cache import RuntimeCache
from the_mask.inference.saved_scores import read_index
from the_mask.modeling.feature_cache import FeatureCache
from the_mask.weights.checkpoint import read_checkpoint
from the_mask.weights.reading import read_weights


@contextmanager
def bounded(seconds: float = 5.0, mebibytes: int = 300) -> Iterator[None]:
    """Check that the block takes less processor time, and less additional memory at its peak."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - start < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < mebibytes << 10


# JSON.

DEEP = "[" * 100_000 + "]" * 100_000
DEEP_OBJECT = '{"a":' * 100_000 + "1" + "}" * 100_000
LONG_NUMBER = "9" * 100_000


def _masks(folder: Path, text: str) -> None:
    (folder / "v").mkdir()
    (folder / "v/0.json").write_text(text)
    StoredMasks(folder).masks(np.zeros((2, 2, 3), np.uint8), ("v", "0"))


def _import(form: str, name: str = "a.json") -> Callable[[Path, str], None]:
    def read(folder: Path, text: str) -> None:
        (folder / "in").mkdir()
        (folder / "in" / name).write_text(text)
        source = folder / "in" if form == "labelme" else folder / "in" / name
        import_dataset(source, form, folder / "out")

    return read


def _features(folder: Path, text: str) -> None:
    backbone = torch.nn.Conv2d(1, 1, 1)
    (FeatureCache(folder, 1000).open(backbone) / "features.json").write_text(text)
    FeatureCache(folder, 1000).open(backbone)


def _file(name: str, read: Callable[[Path], object]) -> Callable[[Path, str], None]:
    def write_and_read(folder: Path, text: str) -> None:
        (folder / name).write_text(text)
        read(folder / name)

    return write_and_read


def _claimed(path: Path) -> None:
    claim_folder(path.parent, {"dataset": "x"})


JSON_READERS: dict[str, Callable[[Path, str], None]] = {
    **{form: _import(form) for form in ("coco", "panoptic", "vipseg", "ytvis", "label-studio", "labelme")},
    "masks": _masks,
    "features": _features,
    "scores": _file("scores.json", lambda path: read_index(path.parent)),
    "weights": _file("model.safetensors.index.json", read_weights),
    "trackers": _file("trackers.json", known_runs),
    "claims": _file("predictions.json", _claimed),
}


@pytest.mark.parametrize("text", [DEEP, DEEP_OBJECT, LONG_NUMBER, '{"a": ' + LONG_NUMBER + "}"], ids=list("1234"))
@pytest.mark.parametrize("reader", JSON_READERS)
def test_json_beyond_all_depth_and_length(tmp_path: Path, reader: str, text: str) -> None:
    with bounded(), pytest.raises(ValueError, match=r"\.json"):
        JSON_READERS[reader](tmp_path, text)


@pytest.mark.parametrize("text", [DEEP, LONG_NUMBER])
def test_json_that_is_made_anew(tmp_path: Path, text: str) -> None:
    """Damaged files that can be made anew are ignored."""
    (tmp_path / "runtimes").mkdir()
    (tmp_path / "runtimes/x.json").write_text(text)
    assert RuntimeCache(tmp_path).choice("x") is None
    (tmp_path / "metrics.json").write_text(f'{{"iteration": 0}}\n{text}\n')
    prepare_metrics_file(tmp_path, 1)
    assert (tmp_path / "metrics.json").read_text() == '{"iteration": 0}\n'


# YAML.


def test_yaml_of_a_million_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("".join(f"k{i}: 1\n" for i in range(1_000_000)))
    with bounded(), pytest.raises(ValueError, match=r"a\.yaml: \d+ bytes, more than"):
        load_config(path)
    path.write_text("{" + ",".join(f"{i}" for i in range(500_000)) + "}")
    # 100,000 take five seconds.
    monkeypatch.setattr(strict_yaml, "MOST_NODES", 2000)
    with bounded(3), pytest.raises(ValueError, match=r"a\.yaml: not valid YAML: line 1: more than 2000 values"):
        load_config(path)


@pytest.mark.parametrize(
    "text",
    ["a: 2001-99-99", "!!int x", "!!int ''", "!!bool 3", "!!timestamp x", "!!float []", "a: 0b_", "!!null x",
     "a: " + "9" * 5000, "!!timestamp 2001-12-14t21:59:43.10+99:99", "!!binary é", "? []\n: 1", "!!set {a, b: c}"],
)  # fmt: skip
def test_yaml_that_is_not_what_it_says(text: str) -> None:
    try:
        parse_yaml(text, "a.yaml")
    except ValueError as error:
        assert "a.yaml" in str(error)  # noqa: PT017  (some are valid)


# Files of tensors.


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 2**32, 100_000_001])
@pytest.mark.parametrize("rest", [b'{"a":', b"{}" + b" " * 100])
def test_safetensors_with_an_endless_head(tmp_path: Path, length: int, rest: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", length) + rest)
    with bounded(), pytest.raises(ValueError, match=r"w\.safetensors is corrupt"):
        read_tensors(path)
    backbone = torch.nn.Conv2d(1, 1, 1)
    cache, images = FeatureCache(tmp_path / "cache", 1000), torch.ones(1, 1, 2, 2)
    cache.features(backbone, lambda x: {"a": x}, images)
    (kept,) = (tmp_path / "cache").rglob("*.safetensors")
    kept.write_bytes(path.read_bytes())
    with bounded(), pytest.raises(ValueError, match=rf"{kept.name} is broken"):
        cache.features(backbone, lambda x: {"a": x}, images)


def test_safetensors_that_claim_other_places(tmp_path: Path) -> None:
    for head in (
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}},
        {"a": {"dtype": "XX", "shape": [1], "data_offsets": [0, 4]}},
    ):
        text = json.dumps(head).encode()
        (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        with bounded(), pytest.raises(ValueError, match=r"w\.safetensors is corrupt"):
            read_tensors(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(save({"a": torch.ones(1)}))
    assert read_tensors(tmp_path / "w.safetensors")["model"]["a"] == 1


def crowded_zip(path: Path, members: int) -> Path:
    """An archive of empty members. Its directory is written by hand, because zipfile takes a minute for a million."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"x"
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, 0, 0, 0, 1, 0) + b"x"
    directory = entry * members
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, members, members, len(directory), len(local))
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(local) + len(directory), 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(local + directory + end64 + locator + end)
    return path


def test_an_archive_of_a_million_members(tmp_path: Path) -> None:
    few = crowded_zip(tmp_path / "few.zip", 1000)
    with zipfile.ZipFile(few) as archive:
        assert len(archive.infolist()) == 1000  # the directory written by hand is valid
    path = crowded_zip(tmp_path / "many.zip", 1_100_000)
    with bounded(), pytest.raises(ValueError, match=r"many\.zip: an archive with room for \d+ members"):
        unpack(path, tmp_path / "x")
    (tmp_path / "many.pth").write_bytes(path.read_bytes())
    for read in (read_checkpoint, read_weights):
        with bounded(), pytest.raises(ValueError, match=r"many\.pth .*room for \d+ members"):
            read(tmp_path / "many.pth")


# Pictures.


def jpeg(*segments: bytes) -> bytes:
    """A JPEG with additional segments after its start."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()[:2] + b"".join(segments) + buffer.getvalue()[2:]


def segment(marker: int, content: bytes) -> bytes:
    """A segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def exif(entries: bytes, count: int, next_ifd: int = 0) -> bytes:
    """EXIF data with one directory."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + struct.pack("<L", next_ifd)


def test_jpegs_with_endless_metadata(tmp_path: Path) -> None:
    """The picture is read, and its metadata take no more memory than their size."""
    path = tmp_path / "a.jpg"
    orientation = struct.pack("<HHLHH", 0x0112, 3, 1, 1, 0)
    cases = {
        "16 MB of ICC": [segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 255]) + bytes(65_000)) for i in range(1, 256)],
        "ICC of 255 parts, one there": [segment(0xE2, b"ICC_PROFILE\0\x01\xff" + bytes(100))],
        "64 KB of EXIF": [segment(0xE1, exif(orientation * 5000, 5000))],
        "16 MB of EXIF": [segment(0xE1, b"Exif\0\0" + bytes(65_000)) for _ in range(250)],
        "directory that leads to itself": [segment(0xE1, exif(orientation, 1, next_ifd=8))],
        "entry of 4 GB": [segment(0xE1, exif(struct.pack("<HHLL", 0x9286, 7, 2**32 - 1, 8) + orientation, 2))],
        "65535 entries, two there": [segment(0xE1, exif(orientation * 2, 65535))],
        "16 MB of comments": [segment(0xFE, bytes(65_000)) for _ in range(250)],
    }
    for name, parts in cases.items():
        path.write_bytes(jpeg(*parts))
        with bounded(3, 200):
            assert read_image(path).shape == (8, 8, 3), name
            assert exif_orientation(path) == 1, name
    path.write_bytes(jpeg(segment(0xE1, exif(struct.pack("<HHLHH", 0x0112, 2, 1, 6, 0), 1))))
    with bounded():  # an orientation that is text
        assert exif_orientation(path) == 1


# Classes.

NAN = float("nan")


@pytest.mark.parametrize(
    "build",
    [
        lambda: make_class_list(["a"], raw_values=[NAN]),
        lambda: make_class_list(["a"], void_values=[NAN]),
        lambda: make_class_list(["a"], colors=[(NAN, 0, 0)]),
        lambda: make_class_list([NAN]),
        lambda: ClassList(("a",), ((0, 0, 0),), (NAN,)),
        lambda: ClassList(("a",), ((0, 0, 0),), {0: NAN}),
        lambda: ClassList(("a",), ((0, 0, 0),), {NAN: 0}),
    ],
)
def test_classes_that_are_no_numbers(build: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="nan"):
        build()


def test_tables_of_classes_that_are_no_numbers(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "masks/0.png")
    for text in ("road,nan,0,0", "road,1e1,0,0", "road,-1,0,0", "road,256,0,0", "road,²,0,0", f"road,{'9' * 5000},0,0"):
        (tmp_path / "masks/classes.csv").write_text(f"class,r,g,b\n{text}\n")
        with pytest.raises(ValueError, match=r"classes\.csv, line 2"):
            import_dataset(tmp_path / "masks", "colors", tmp_path / "out")
    for color in ([NAN, 0, 0], [0, 0], [0.5, 0, 0], "abc", [256, 0, 0], [-1, 0, 0], 7):
        content = {"categories": [{"id": 1, "name": "a", "color": color}], "images": [], "annotations": []}
        (tmp_path / "a.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"a\.json.*color"):
            import_dataset(tmp_path / "a.json", "coco", tmp_path / "out")


# Links.


def test_links_that_take_a_folders_place_meanwhile(tmp_path: Path) -> None:
    """Another process keeps replacing an output folder by a link to another place."""
    out, elsewhere, real = tmp_path / "out", tmp_path / "elsewhere", tmp_path / "real"
    for folder in (out, elsewhere, real):
        folder.mkdir()
    stop = threading.Event()

    def swap() -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            with suppress(FileNotFoundError):
                os.rename(out / "v", real / str(number))
            with suppress(FileExistsError):
                os.symlink(elsewhere, out / "v")
                os.unlink(out / "v")

    thread = threading.Thread(target=swap)
    thread.start()
    outcomes: Counter[str] = Counter()
    try:
        end = time.monotonic() + 20
        for number in itertools.count():
            if number >= 3000 and (outcomes["ValueError"] or time.monotonic() > end):
                break
            try:
                write_inside(out, "v", f"{number}.png", content=b"x")
                outcomes["written"] += 1
            except (ValueError, OSError) as error:
                outcomes[type(error).__name__ if "out/v" in str(error) else str(error)] += 1
    finally:
        stop.set()
        thread.join()
    assert not list(elsewhere.iterdir())
    assert len(list(real.rglob("*.png"))) + len(list(out.rglob("*.png"))) == outcomes["written"] > 0
    assert outcomes["ValueError"] > 0, "the link was never met"
    assert set(outcomes) <= {"written", "ValueError", "FileNotFoundError", "NotADirectoryError", "FileExistsError"}


def test_a_link_on_the_way_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/a").mkdir(parents=True)
    (tmp_path / "out/a/v").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out/file").write_text("")
    with pytest.raises(ValueError, match=r"out/a/v/0\.png lies behind the symbolic link v"):
        write_inside(tmp_path / "out", "a/v/0.png", content=b"x")
    with pytest.raises(OSError, match=r"out/file/0\.png"):
        write_inside(tmp_path / "out", "file", "0.png", content=b"x")
    for name in ("../x", "/x", "a/../../x", ""):
        with pytest.raises(ValueError, match="name"):
            write_inside(tmp_path / "out", name, content=b"x")
    assert not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / "out/0.png").symlink_to(tmp_path / "elsewhere/0.png")
    assert write_inside(tmp_path / "out", "0.png", content=b"x") == inside(tmp_path / "out", "0.png")
    assert not (tmp_path / "elsewhere/0.png").exists()
