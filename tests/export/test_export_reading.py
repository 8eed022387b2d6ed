"""Packages from anyone: changed, exchanged or made to run code, they are refused before torch opens them."""

import json
import os
import pickle
import re
import shutil
import zipfile

import pytest
import torch
from torch import nn

from the_mask.export import UnsafePackageError, export_package, open_torch
from the_mask.export.package import OnnxSession, TorchSession
from the_mask.export.reading import check_expression, check_function, look_through
from the_mask.modeling.segmentor import Segmentor

SIZE = (16, 24)


class Plain(Segmentor):
    """A convolution."""

    score_stride = 2

    def __init__(self, channels=4):
        super().__init__(
            num_classes=channels,
            ignore_label=255,
            pixel_mean=[9.0, 8, 7],
            pixel_std=[50.0, 60, 70],
            size_divisibility=4,
        )
        self.conv = nn.Conv2d(3, channels, 2, stride=2)

    def losses(self, clips):
        raise NotImplementedError

    def group_scores(self, images, num_frames):
        yield self.conv(images).softmax(dim=1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported")
    export_package(Plain().eval(), folder, SIZE, kinds=["image"], formats=["torch"], dynamic=True)
    return folder


@pytest.fixture
def package(exported, tmp_path):
    """A copy: folder and its .pt2 file."""
    folder = shutil.copytree(exported, tmp_path / "package")
    return folder, folder / "image.pt2"


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def rewritten(path, changes, root="archive"):
    """The package with some parts replaced or added, as torch writes packages; its manifest is taken away."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]
        parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    for name, change in changes.items():
        content = change(parts.get(name)) if callable(change) else change
        if content is None:
            del parts[name]
        else:
            parts[name] = content
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            archive.writestr(f"{root}/{name}", content)
    (path.parent / "export.json").unlink(missing_ok=True)
    return path


def test_what_we_write_is_opened(exported):
    program = open_torch(exported / "image.pt2")
    frame = torch.rand(3, *SIZE) * 255
    for size in (SIZE, (20, 32)):
        frame = torch.rand(3, *size) * 255
        expected = torch.export.load(exported / "image.pt2").module()(frame)
        assert torch.equal(program(frame)[0], expected[0])
    assert sorted(path.name for path in exported.iterdir()) == ["export.json", "image.pt2"]


def test_rewriting_alone_changes_nothing(package):
    """The attacks below are refused for what they change, not for how they were written."""
    _, path = package
    frame = torch.rand(3, *SIZE) * 255
    expected = open_torch(path)(frame)[0]
    assert torch.equal(open_torch(rewritten(path, {}))(frame)[0], expected)


@pytest.mark.parametrize("place", [0, 0.3, 0.6, 1])
def test_a_changed_byte(package, place):
    _, path = package
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    with pytest.raises(UnsafePackageError, match=r"image\.pt2 is not the file that .*export\.json describes"):
        TorchSession(path)


def test_exchanged_and_unknown_files(package, tmp_path):
    folder, path = package
    export_package(Plain(5).eval(), tmp_path / "other", SIZE, kinds=["image"], formats=["torch"])
    shutil.copy(tmp_path / "other" / "image.pt2", path)
    with pytest.raises(UnsafePackageError, match="is not the file"):
        open_torch(path)
    with pytest.raises(UnsafePackageError, match=r"has no digest of step\.pt2"):
        open_torch(path.rename(folder / "step.pt2"))
    with pytest.raises(FileNotFoundError, match=r"exported program .*image\.pt2 does not exist"):
        open_torch(path)
    (folder / "export.json").write_text("[]")
    with pytest.raises(ValueError, match=r"manifest .*export\.json holds list"):
        open_torch(folder / "step.pt2")


def test_a_changed_onnx_program(exported, tmp_path):
    pytest.importorskip("onnxruntime", reason="extra export is not installed")
    pytest.importorskip("onnxscript", reason="extra export is not installed")
    export_package(Plain().eval(), tmp_path, SIZE, kinds=["image"], formats=["onnx"])
    path = tmp_path / "image.onnx"
    OnnxSession(path)(torch.rand(3, *SIZE))
    extra = tmp_path / "image.onnx.data"
    extra.write_bytes(b"weights of somebody else")
    with pytest.raises(UnsafePackageError, match=r"has no digest of image\.onnx\.data"):
        OnnxSession(path)
    extra.unlink()
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UnsafePackageError, match=r"image\.onnx is not the file"):
        OnnxSession(path)


def changed(**values):
    """A change of the first tensor's entry in a table of weights."""

    def change(content):
        table = json.loads(content)
        next(iter(table["config"].values())).update(values)
        return json.dumps(table).encode()

    return change


def before_expressions(code):
    """Something put before every expression of sizes."""

    def change(content):
        changed, number = re.subn(rb'"expr_str":\s*"', lambda found: found[0] + code.encode(), content)
        assert number
        return changed

    return change


def node_with(target):
    """The first operator of the graph is another function."""

    def change(content):
        program = json.loads(content)
        program["graph_module"]["graph"]["nodes"][0]["target"] = target
        return json.dumps(program).encode()

    return change


WEIGHTS, PROGRAM = "data/weights/model_weights_config.json", "models/model.json"
EXAMPLES = "data/sample_inputs/model.pt"


def attacks(flag):
    evil = pickle.dumps(Evil(flag))
    stored = pickle.dumps(Evil(flag), protocol=2)
    return {
        "examples are a pickle": ({EXAMPLES: stored}, r"model\.pt is a pickle of more than tensors"),
        "a pickled weight": ({WEIGHTS: changed(use_pickle=True)}, r"'model\.conv\.\w+' of .* is pickled"),
        "another part as weight": ({WEIGHTS: changed(path_name="../x")}, "is no tensor"),
        "weights of the old kind": ({"data/weights/model.pt": evil}, r"data/weights/model\.pt is no part"),
        "an object": ({"data/constants/opaque_obj_0": evil}, "is no part of a program"),
        "a compiled library": ({"data/aotinductor/model/x.so": b"\x7fELF"}, "is no part of a program"),
        "a second program": ({"models/other.json": b"{}"}, "is no part of a program"),
        "the old layout": ({"serialized_exported_program.json": b"{}"}, "is no part of a program"),
        "no examples": ({EXAMPLES: None}, "it has no data/sample_inputs"),
        "a function of torch": ({PROGRAM: node_with("torch.serialization.os.system")}, "calls 'torch.serialization"),
        "a function of operator": ({PROGRAM: node_with("_operator.call")}, "calls '_operator.call'"),
        "an operator on files": ({PROGRAM: node_with("torch.ops.aten.from_file.default")}, "which opens files"),
        "an extension": ({PROGRAM: node_with("#triton:x")}, "calls '#triton:x'"),
        "an expression": (
            {PROGRAM: before_expressions(f"__import__('os').system('touch {flag}') or ")},
            "the expression .* calls what it computes",
        ),
    }


@pytest.mark.parametrize("attack", attacks(""))
def test_attacks(package, tmp_path, attack):
    _, path = package
    flag = tmp_path / "executed"
    changes, message = attacks(flag)[attack]
    rewritten(path, changes)
    with pytest.raises(UnsafePackageError, match=message):
        open_torch(path)
    assert not flag.exists()


def test_the_attack_is_one(package, tmp_path):
    """torch itself runs it; so do we when we are told to trust."""
    _, path = package
    flag = tmp_path / "executed"
    rewritten(path, {EXAMPLES: attacks(flag)["examples are a pickle"][0][EXAMPLES]})
    with pytest.raises(Exception):  # noqa: B017, PT011  (what it gives is no tuple)
        open_torch(path, trust=True)
    assert flag.exists()


def test_two_readers_see_the_same(package):
    """A part that Python's reader of archives does not see, or sees twice, is refused."""
    folder, path = package
    content = path.read_bytes()
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(f"{archive.namelist()[0].split('/')[0]}/models/model.json", "{}")
    with pytest.raises(UnsafePackageError, match="is there twice"):
        look_through(path.read_bytes())
    path.write_bytes(content)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{archive.namelist()[0].split('/')[0]}/version", "{}")
    with pytest.raises(UnsafePackageError, match="is compressed"):
        look_through(path.read_bytes())
    path.write_bytes(content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("elsewhere/models/model.json", "{}")
    with pytest.raises(ValueError, match=r"not in a subdirectory|not the same for every reader"):
        look_through(path.read_bytes())
    (folder / "export.json").unlink()
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"image\.pt2: it is no package of torch"):
        open_torch(path)


SIZES = [
    "s0",
    "8*s12 + 1",
    "FloorDiv(s0 - 1, 2) + 1",
    "Mul(Integer(2), Symbol('s99', positive=True, integer=True))",
    "Add(Float('1.5', precision=53), Rational(1, 2))",
    "StrictLessThan(Integer(3), Symbol('u3'))",
    "((s0//4))",
    "s0**2",
    "1.5",
    "True",
]


@pytest.mark.parametrize("text", SIZES)
def test_expressions_that_are_sizes(text):
    check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "os",
        "s0.x",
        "s0[0]",
        "eval('1')",
        "lambda: 1",
        "(s0 for s0 in s1)",
        "f'{s0}'",
        "'s0'",
        "Max(s0, key='s1')",
        "s0 if 1 else 2",
        "Symbol('x')",
        "Integer('s1')",
        "Symbol('s0')('s1')",
        "Lambda(s0, s0)",
        "sympify('s0')",
        "Float('s0')",
        "a" * 3000,
        "(" * 500 + ")" * 500,
        "1\n",
        3,
        None,
        "s0\0",
        "Max(*s0)",
        "(s0 := 3)",
        "await s0",
        "__s0__",
    ],
)
def test_expressions_that_are_none(text):
    if text == "1\n":
        check_expression(text)
        return
    with pytest.raises(UnsafePackageError):
        check_expression(text)


class WithBlock(Plain):
    """A part of it is a block of its own in the program."""

    def group_scores(self, images, num_frames):
        scores = self.conv(images)
        with torch.autocast(images.device.type, enabled=False):
            scores = scores.float().softmax(dim=1)
        yield scores


def test_blocks_of_a_program_are_looked_at(tmp_path):
    export_package(WithBlock().eval(), tmp_path / "out", SIZE, kinds=["image"], formats=["torch"])
    path = tmp_path / "out" / "image.pt2"
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(PROGRAM))
        program = archive.read(name)
    assert b"torch.ops.higher_order.wrap_with_autocast" in program
    inside = b"torch.ops.aten.softmax.int"
    assert program.count(inside) == 1
    rewritten(path, {PROGRAM: program.replace(inside, b"torch.serialization.os.system")})
    with pytest.raises(UnsafePackageError, match=r"calls 'torch\.serialization"):
        open_torch(path)


def test_functions():
    for target in ("torch.ops.aten.conv2d.default", "_operator.getitem", "torch.sym_max", "math.ceil"):
        check_function(target)
    for target in (
        "torch.ops.aten.no_such.default",
        "torch.load",
        "torch.ops.aten",
        "torch.ops.aten.conv2d.__call__",
        "_operator.attrgetter",
        "math.__loader__",
        "torch.sym_int.__globals__",
        None,
        3,
        "x",
    ):
        with pytest.raises(UnsafePackageError):
            check_function(target)


def test_an_export_that_fails_changes_nothing(package):
    folder, _ = package
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(RuntimeError, match=r"package/image\.pt2 differs from the model"):
        export_package(Plain().eval(), folder, SIZE, kinds=["image"], formats=["torch"], tolerance=-1)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
