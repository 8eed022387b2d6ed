"""Files of tensors: every format by its content, and nothing that a file names is ever called.

Right values come from Python's, numpy's, torch's and safetensors' own writers.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
import sys
import types
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from the_mask.data import pickle_names
from the_mask.data.pickle_names import STAND_INS, TORCH_GLOBALS
from the_mask.data.tensor_files import load_safetensors, read_tensors, safetensors_bytes, state_dict_of

ARRAYS = {
    "fortran": np.arange(6.0).reshape(2, 3).T,
    "scalar": np.float32(3),
    "bool": np.bool_(True),
    "empty": np.zeros((0, 4), np.float32),
    "big endian": np.arange(4, dtype=">i4"),
    "text": np.array(["x", "yz"]),
    "half": np.ones((2, 1), np.float16),
    "zero axes": np.array(2.5),
    "complex": np.array([1j]),
}


def same(first: Any, second: Any) -> bool:
    """Equal values; arrays and numpy scalars by value, shape and kind."""
    if isinstance(second, (np.ndarray, np.generic)):
        first, second = np.asarray(first), np.asarray(second)
        return first.shape == second.shape and first.dtype.kind == second.dtype.kind and bool((first == second).all())
    if isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in second)
    return bool(first == second)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".bin"])
def test_pickles_of_every_protocol(tmp_path: Path, protocol: int, suffix: str) -> None:
    content = {"a": OrderedDict(ARRAYS), "b": [1, (2.5, None), {4}, frozenset([5]), b"\xff", b"", "é", True, 2**80, 3j]}
    path = tmp_path / f"w{suffix}"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert same(read_tensors(path), {**content, "a": dict(ARRAYS)})


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before 1.6"])
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
def test_files_of_torch(tmp_path: Path, archive: bool, suffix: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    numbers = [torch.ones(2, dtype=d) for d in (torch.bfloat16, torch.half, torch.int64, torch.bool, torch.complex64)]
    content = {"model": module.state_dict(), "parameter": torch.nn.Parameter(torch.ones(2)), "numbers": numbers}
    content |= {"arrays": ARRAYS, "rest": [Counter([1]), {2}, torch.Size([3]), torch.device("cpu"), torch.float16, 1j]}
    torch.save(content, tmp_path / f"w{suffix}", _use_new_zipfile_serialization=archive)
    found = read_tensors(tmp_path / f"w{suffix}")
    assert all(torch.equal(found["model"][name], value) for name, value in module.state_dict().items())
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found["numbers"], numbers, strict=True))
    assert same(found["arrays"], ARRAYS)
    assert found["rest"] == [{1: 1}, *content["rest"][1:]]


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors", ""])
def test_safetensors_under_any_name(tmp_path: Path, suffix: str) -> None:
    save_file({"x": torch.arange(3)}, tmp_path / f"w{suffix}", metadata={"k": "v"})
    found = read_tensors(tmp_path / f"w{suffix}")
    assert found["k"] == "v"
    assert found["model"]["x"].tolist() == [0, 1, 2]


def test_equal_tensors_give_equal_files(tmp_path: Path) -> None:
    """In safetensors' own order of the notes, two of six come in one of two orders each time."""
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.float16), "none": torch.ones(0, 3)}
    notes = {"format": "pt", "class_names": '["Straße", "b"]', "x": "", "a": "1", "c": "2", "z": "\n\\"}
    files = {safetensors_bytes(tensors, notes) for _ in range(20)}
    assert len(files) == 1
    (tmp_path / "w").write_bytes(files.pop())
    found, metadata = load_safetensors(tmp_path / "w")
    assert metadata == notes
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)


def test_wrappers_and_prefixes() -> None:
    one = torch.ones(1)
    assert list(state_dict_of({"module": {"state_dict": {"a": one}}}, "w")) == ["a"]
    names = ["module._orig_mod.module.a", "module.module._orig_mod._orig_mod.b._orig_mod.c", "module.module.module.d"]
    assert list(state_dict_of(dict.fromkeys(names, one), "w")) == ["a", "b.c", "module.d"]
    assert list(state_dict_of({"module.a": one, "b": one}, "w")) == ["module.a", "b"]
    with pytest.raises(ValueError, match=r"differ only by '_orig_mod.'"):
        state_dict_of({"a": one, "_orig_mod.a": one}, "w")
    circle: dict[str, Any] = {"k": 1}
    circle["model"] = circle
    with pytest.raises(ValueError, match="holds no tensors"):
        state_dict_of(circle, "w")


# What may be called.


def test_every_callable_is_ours_and_takes_only_plain_data() -> None:
    """Each stand-in is called with everything that a pickle could hand to it: plain data come out, or an error."""
    plain = (bytes, set, frozenset, complex, dict, int, float, bool, str, type(None))
    arguments = [None, 0, -1, 2**40, "f4", "O", "V8", b"x", "x", (1,), (), [], {}, {"a": 1}, "latin1", "zip", "idna"]
    arguments += [*STAND_INS.values(), pickle_names.StoredNumber("i4"), pickle_names.StoredArray()]
    for name, stand_in in STAND_INS.items():
        assert type(stand_in) is pickle_names.StandIn, name
        for given_ in [(), *((a,) for a in arguments), *((a, b) for a in arguments for b in arguments)]:
            try:
                result = stand_in(*given_)
            except (ValueError, TypeError):
                continue
            assert isinstance(result, (*plain, pickle_names.StoredArray, pickle_names.StoredNumber)), (name, given_)
        for state in ({}, {"_call": print}, (None, {"_call": print})):
            with pytest.raises(ValueError, match="a change of"):
                stand_in.__setstate__(state)
        with pytest.raises(ValueError, match="a change of"):
            stand_in._call = print


def test_numpy_itself_is_never_given_to_a_pickle() -> None:
    for given_ in pickle_names.FOR_TORCH:
        value = given_[0]
        assert type(value) is pickle_names.StandIn or value in (pickle_names.StoredArray, pickle_names.StoredNumber)
    from torch._weights_only_unpickler import _get_allowed_globals

    theirs = {name: value for name, value in _get_allowed_globals().items() if name in TORCH_GLOBALS}
    functions = {
        name for name, value in theirs.items() if type(value).__name__ in ("function", "type", "_ParameterMeta")
    }
    called = {name for name in functions if not isinstance(theirs[name], torch.dtype)}
    allowed = {"collections.OrderedDict", "collections.Counter", "builtins.set", "builtins.complex", "torch.Size"}
    allowed |= {"torch.device", *(f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "parameter"))}
    assert called <= allowed


def code(*names: str, arguments: bytes = b")") -> bytes:
    """A pickle that calls the named global with the arguments of an instruction."""
    module, name = names
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments + b"R."


class Payload:
    """Unpickling it creates a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def object_array() -> bytes:
    """Bytes of the file as pointers to objects: numpy.ndarray((1,), 'O', b'AAAAAAAA'), then its only item is used."""
    text = b"\x80\x02cnumpy\nndarray\n(K\x01\x85U\x01OU\x08AAAAAAAAtR."
    pickletools.dis(text, out=open(os.devnull, "w"))  # noqa: SIM115
    return text


def object_state(kind: str = "O") -> bytes:
    """``_reconstruct`` and a state with objects, as numpy pickles them."""
    array = np.empty(1, dtype=object) if kind == "O" else np.zeros(1, dtype=[("a", "i4")])
    return pickle.dumps({"model": array}, protocol=2)


ATTACKS = {
    "object array over bytes": object_array(),
    "object array": object_state(),
    "structured array": object_state("fields"),
    "dtype of objects": code("numpy", "dtype", arguments=b"U\x01O\x85"),
    "dtype of void": code("numpy", "dtype", arguments=b"U\x02V8\x85"),
    "numpy's loader": code("numpy", "load", arguments=b"U\x01x\x85"),
    "os.system": code("os", "system", arguments=b"U\x04true\x85"),
    "eval": code("builtins", "eval", arguments=b"U\x011\x85"),
    "getattr": code("__builtin__", "getattr"),
    "new object": b"\x80\x02cnumpy\ndtype\n)\x81.",
    "instance": b"(inumpy\ndtype\n.",
    "object": b"(cnumpy\ndtype\no.",
    "extension": b"\x80\x02\x82\x01.",
    "changed stand-in": b"\x80\x02cnumpy\ndtype\n}(U\x05_callK\x01ub.",
    "changed stand-in's slot": b"\x80\x02cnumpy\ndtype\nN}(U\x05_callK\x01u\x86b.",
    "stand-in as a value": b"\x80\x02cnumpy\nndarray\n.",
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
}
DAMAGE = {
    "no bytes for a shape": pickle.dumps(np.zeros(3)).replace(b"K\x03\x85", b"K\x09\x85"),
    "negative shape": b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02f4\x85RU\x01x\x86R.",
    "memo index": b"\x80\x02K\x01r\xff\xff\xff\x7f.",
    "memo that is not there": b"\x80\x02h\x05.",
    "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**61) + b"x.",
    "long frame": b"\x80\x04\x95" + struct.pack("<Q", 2**61) + b"K\x01.",
    "unhashable key": b"\x80\x02}]K\x01s.",
    "no mark": b"\x80\x02t.",
    "pop of nothing": b"\x80\x02000.",
    "self": b"\x80\x02}q\x00U\x05modelh\x00s.",
    "self in a list": b"\x80\x02]q\x00h\x00a.",
    "deep": b"\x80\x02" + b"]" * 9000 + b"a" * 8999 + b".",
    "deep tuple": b"\x80\x02K\x01" + b"\x85" * 100_000 + b".",
    "billion tuples": b"\x80\x02)q\x00"
    + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    + b"}h\x3cK\x01s.",
    "number of digits": b"I" + b"9" * 100_000 + b"\n.",
    "set of a list": b"\x80\x02c__builtin__\nset\n]]a\x85R.",
    "complex of text": code("builtins", "complex", arguments=b"U\x01x\x85"),
}


def write(path: Path, content: bytes, kind: str) -> Path:
    """A pickle as a file of its own, in an archive of torch's, or in torch's older stream."""
    if kind == "pickle":
        path.write_bytes(content)
    elif kind == "archive":
        torch.save({"x": torch.ones(1)}, path)
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, content if name.endswith("data.pkl") else data)
    else:
        head = b"".join(pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        path.write_bytes(head + content + pickle.dumps([], protocol=2))
    return path


@pytest.mark.parametrize("kind", ["pickle", "archive", "stream"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused(tmp_path: Path, attack: str, kind: str) -> None:
    with pytest.raises(ValueError, match=r"w.pth is (refused|corrupt)"):
        read_tensors(write(tmp_path / "w.pth", ATTACKS[attack], kind))


@pytest.mark.parametrize("kind", ["pickle", "archive", "stream"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_and_bombs_have_an_error(tmp_path: Path, damage: str, kind: str) -> None:
    with pytest.raises(ValueError, match=r"w.pth is (refused|corrupt)"):
        read_tensors(write(tmp_path / "w.pth", DAMAGE[damage], kind))


@pytest.mark.parametrize("kind", ["pickle", "archive", "stream"])
def test_code_runs_only_when_trusted(tmp_path: Path, kind: str) -> None:
    trace = tmp_path / "executed"
    path = write(tmp_path / "w.pth", pickle.dumps(Payload(str(trace)), protocol=2), kind)
    with pytest.raises(ValueError, match=r"refused: .*(posix|nt).mkdir.*--trust-pickle"):
        read_tensors(path)
    assert not trace.exists()
    read_tensors(path, trust=True)
    assert trace.exists()


def test_an_archive_is_bounded_before_it_is_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", pickle.dumps({"a": 1}, protocol=2))
        archive.writestr("w/data/0", bytes(2**25))
    with pytest.raises(ValueError, match="claims to hold"):
        read_tensors(tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "n.pth", "w") as archive:
        archive.writestr("arr_0.npy", b"x" * 100)
    with pytest.raises(ValueError, match=r"not one that torch\.save has written"):
        read_tensors(tmp_path / "n.pth")


def test_what_is_mistaken_for_weights_is_named(tmp_path: Path) -> None:
    for text, said in {
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "git lfs pull",
        "<!doctype html><title>Not found</title>": "a web page",
        "\x89HDF\r\n\x1a\n": "HDF5",
    }.items():
        (tmp_path / "w.pth").write_bytes(text.encode("latin1"))
        with pytest.raises(ValueError, match=said):
            read_tensors(tmp_path / "w.pth")
    with pytest.raises(FileNotFoundError, match=r"weights file .*none.pth does not exist"):
        read_tensors(tmp_path / "none.pth")


@pytest.mark.parametrize("archive", [True, False])
def test_classes_that_are_not_installed_are_empty_under_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: bool
) -> None:
    """mmengine's checkpoints hold its HistoryBuffer; nobody needs mmengine to read their weights."""
    names = ["mmengine", "mmengine.logging", "mmengine.logging.history_buffer"]
    with monkeypatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        buffer = type("HistoryBuffer", (), {"__module__": names[-1]})
        patch.setattr(sys.modules[names[-1]], "HistoryBuffer", buffer, raising=False)
        history = buffer()
        history._log_history = np.ones(3)
        content = {"state_dict": {"w": torch.ones(2)}, "message_hub": {"loss": history}}
        path = tmp_path / "w.pth"
        torch.save(content, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError, match=r"refused.*mmengine\.logging\.history_buffer\.HistoryBuffer"):
        read_tensors(path)
    assert state_dict_of(read_tensors(path, trust=True), path)["w"].tolist() == [1, 1]


_operations = st.sampled_from(
    [o.code.encode("latin1") for o in pickletools.opcodes if o.name not in ("STOP", "GLOBAL", "INST")]
)
_pieces = st.one_of(
    _operations,
    st.binary(max_size=6),
    st.sampled_from(sorted(STAND_INS | dict.fromkeys(TORCH_GLOBALS))).map(
        lambda name: b"c" + name.rpartition(".")[0].encode() + b"\n" + name.rpartition(".")[2].encode() + b"\n"
    ),
)


PLAIN = (bool, int, float, complex, str, bytes, torch.Tensor, torch.Size, torch.dtype, torch.device, np.ndarray)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(_pieces, max_size=30), kind=st.sampled_from(["pickle", "archive"]))
def test_random_programs_end_in_plain_data_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], kind: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.pth"
    stack, message = [], ""
    try:
        stack = [read_tensors(write(path, b"\x80\x02" + b"".join(pieces) + b".", kind))]
    except ValueError as error:
        message = str(error)
    assert not message or path.name in message
    while stack:
        value = stack.pop()
        if type(value) is dict:
            stack += [*value, *value.values()]
        elif type(value) in (list, tuple, set, frozenset):
            stack += value
        else:
            assert value is None or type(value) in PLAIN
