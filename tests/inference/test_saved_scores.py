"""Score files that are damaged or made to harm: named, and never unpacked beyond the frame's own size."""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from the_mask.inference.saved_scores import SavedScores, ScoreWriter, read_index

SIZE = (6, 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ScoreWriter(tmp_path, ["a", "b"]).write(("v", "0"), torch.rand(2, *SIZE))
    return tmp_path


def test_numpy_reads_the_files(folder: Path) -> None:
    with np.load(folder / "v/0.npz") as archive:
        stored = archive["scores"]
    assert torch.equal(SavedScores(folder).read(("v", "0"), SIZE), torch.from_numpy(stored.astype(np.float32)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_bytes_are_named_or_change_nothing(folder: Path, data: st.DataObject) -> None:
    path = folder / "v/0.npz"
    whole = path.read_bytes()
    wanted = SavedScores(folder).read(("v", "0"), SIZE)
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(changed[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else changed)
    try:
        found, message = SavedScores(folder).read(("v", "0"), SIZE), "0.npz cannot be read"
    except ValueError as error:
        found, message = wanted, str(error)
    path.write_bytes(whole)
    assert torch.equal(found, wanted)
    assert "0.npz cannot be read" in message


def archive_of(header: dict, body: bytes, name: str = "scores.npy") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, header)
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, stream.getvalue() + body)
    return target.getvalue()


@pytest.mark.parametrize(
    ("shape", "descr", "length", "message"),
    [
        ((2, 10**6, 10**6), "<f2", 0, r"of shape \[2, 1000000, 1000000\], expected float16 of \[2, 6, 8\]"),
        ((2, *SIZE), "<f2", 200 << 20, "193 bytes of scores, expected 192"),
        ((2, *SIZE), "<f2", 3, "3 bytes of scores"),
        ((2, *SIZE), "<f8", 768, "float64"),
        ((2, *SIZE), "|O", 0, "object"),
    ],
)
def test_bombs_are_not_unpacked(folder: Path, shape: tuple, descr: str, length: int, message: str) -> None:
    header = {"shape": shape, "fortran_order": False, "descr": descr}
    (folder / "v/0.npz").write_bytes(archive_of(header, bytes(length)))
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"0.npz cannot be read \(.*{message}"):
        SavedScores(folder).read(("v", "0"), SIZE)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


INDICES = ["", "[]", "3", "{", '{"format": 2}', '{"format": 1}', "[" * 100_000]
INDICES += [json.dumps({"format": 1, "classes": classes}) for classes in ([], "ab", [1, 2], {"a": 0})]


@pytest.mark.parametrize("content", INDICES)
def test_bad_indices_are_named(folder: Path, content: str) -> None:
    (folder / "scores.json").write_text(content)
    with pytest.raises(ValueError, match=r"scores\.json"):
        read_index(folder)
