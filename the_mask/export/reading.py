"""Opening exported programs that may come from anyone: checked by digest, and looked through, before torch sees them.

torch's own loader of ``.pt2`` files unpickles example inputs and whatever a package calls pickled, calls any function
below ``torch`` that a program names, evaluates expressions of sizes and loads compiled libraries. Here a package is
read once; the names of its parts, its operators and its expressions are held to lists of what :func:`export_package`
writes; and torch is given the very bytes that were looked through.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from the_mask.data.files import file_digest, read_json

MANIFEST = "export.json"
# Parts of a package without pickles, but for the example inputs, which torch's reader of plain tensors looks at.
PARTS = (
    r"archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id|\.format_version|"
    r"\.storage_alignment|version|"
    r"models/model\.json|data/sample_inputs/model\.pt|"
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
)
PAYLOADS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
PROGRAM, EXAMPLES = "models/model.json", "data/sample_inputs/model.pt"
# Functions of Python and of torch itself that a graph may call, beside torch's operators.
FUNCTIONS = re.compile(
    r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|torch\.sym_(int|float|max|min|not|ite|sum)|math\.(ceil|floor|trunc|sqrt)"
    # A block of the same graph, whose own calls are looked at like all others.
    r"|torch\.ops\.higher_order\.wrap_with_autocast"
)
OPERATOR = re.compile(r"torch\.ops\.(aten|prims)\.(\w+)\.(\w+)")
# Names in expressions of sizes.
SYMBOL = re.compile(r"[suz]\w*\d+")
CALLS = re.compile(
    r"Abs|Add|And|CeilToInt|CleanDiv|Equality|Float|FloatTrueDiv|FloorDiv|FloorToInt|GreaterThan|Integer|IntTrueDiv|"
    r"LessThan|Max|Min|Mod|Mul|Not|Or|Pow|PythonMod|Rational|RoundToInt|StrictGreaterThan|StrictLessThan|Symbol|"
    r"ToFloat|TruncToInt|Unequality|Where|ceiling|floor|Eq|Ne|Ge|Gt|Le|Lt"
)
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]*)?(e[+-]?[0-9]{1,4})?")
NODES = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.Constant,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.expr_context,
)
MAX_EXPRESSION = 2_000


class UnsafePackageError(ValueError):
    """A package holds what could run code, or is not the one that its manifest describes."""


def open_torch(path: str | Path, trust: bool = False) -> Any:
    """The module of a ``.pt2`` file: ``module(*tensors)`` gives a tuple of tensors.

    Args:
        path: the file. If there is an ``export.json`` next to it, it must have the file's digest.
        trust: do not check the package: let it run its own code.

    Raises:
        FileNotFoundError: no such file.
        UnsafePackageError: see there.
        ValueError: damaged.
    """
    path = Path(path)
    data = read_checked(path)
    if not trust:
        try:
            look_through(data)
        except UnsafePackageError as error:
            raise UnsafePackageError(
                f"{path} is refused: {error}; if its source is trusted, pass trust=True"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    program = torch.export.load(io.BytesIO(data))
    # Guards would be code from the package; shapes are checked without them.
    return program.module(check_guards=trust)


def read_checked(path: Path) -> bytes:
    """Read a file of a package; its digest must be that in the ``export.json`` next to it, if there is one.

    Raises:
        FileNotFoundError: no such file.
        UnsafePackageError: another digest, or a manifest that does not know the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"exported program {path} does not exist")
    data = path.read_bytes()
    _compare(path, hashlib.sha256(data).hexdigest(), _described(path))
    return data


def check_digests(path: Path) -> None:
    """Raise unless a file and its weights files have the digests in the ``export.json`` next to them, if there is one.

    Raises:
        FileNotFoundError, UnsafePackageError: as :func:`read_checked`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"exported program {path} does not exist")
    described = _described(path)
    for file in sorted({path, *path.parent.glob(f"{glob.escape(path.name)}.*")}):
        _compare(file, file_digest(file), described)


def _compare(path: Path, found: str, described: dict[str, str] | None) -> None:
    if described is None:
        return
    manifest = path.parent / MANIFEST
    expected = described.get(path.name)
    if expected is None:
        raise UnsafePackageError(
            f"{manifest} has no digest of {path.name}: an older version wrote it, or the file is not of this package; "
            "export again"
        )
    if found != expected:
        raise UnsafePackageError(
            f"{path} is not the file that {manifest} describes: its SHA-256 is {found}, expected {expected}; export "
            "again, or get the package again"
        )


def _described(path: Path) -> dict[str, str] | None:
    """Digests of a package's files by name, from the manifest next to a file; None without a manifest."""
    manifest = path.parent / MANIFEST
    if not manifest.is_file():
        return None
    found: dict[str, str] = {}
    for digests in _values(read_json(manifest, "manifest"), ("sha256",)):
        if isinstance(digests, dict):
            found |= {str(name): str(digest) for name, digest in digests.items()}
    return found


def look_through(data: bytes) -> None:
    """Raise unless a ``.pt2`` package holds nothing but tensors and a graph of known operators.

    Raises:
        UnsafePackageError: it holds something else, which is named.
        ValueError: it is not such a package.
    """
    parts = _parts(data)
    absent = [name for name in (PROGRAM, EXAMPLES, *PAYLOADS) if name not in parts]
    if absent:
        raise UnsafePackageError(f"it has no {absent[0]}, so torch would read it in another way")
    for name in PAYLOADS:
        _check_payload(name, _json(parts, name))
    try:
        content = torch.load(io.BytesIO(parts[EXAMPLES]), weights_only=True) if parts[EXAMPLES] else ()
    except Exception as error:
        raise UnsafePackageError(f"{EXAMPLES} is a pickle of more than tensors ({error})".splitlines()[0]) from error
    if not isinstance(content, (tuple, dict)):
        raise UnsafePackageError(f"{EXAMPLES} holds a {type(content).__name__}")
    program = _json(parts, PROGRAM)
    for target in _values(program, ("target", "as_operator")):
        check_function(target)
    for expression in _values(program, ("expr_str",)):
        check_expression(expression)


def _parts(data: bytes) -> dict[str, bytes]:
    """Parts of the archive, as torch finds them; names that only one of the two readers sees are refused."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is no package of torch: {error}") from error
    names = [entry.filename for entry in entries]
    strange = sorted(name for name in names if not re.fullmatch(rf"[\w.-]+/({PARTS})", name))
    if strange:
        raise UnsafePackageError(f"{strange[0]} is no part of a program of tensors")
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    twice = sorted({name for name in names if names.count(name) > 1})
    if packed or twice:
        raise UnsafePackageError(f"{(packed or twice)[0]} is {'compressed' if packed else 'there twice'}")
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(data))
        found = {name: bytes(reader.get_record(name)) for name in reader.get_all_records()}
    except RuntimeError as error:
        raise ValueError(f"it is no package of torch: {error}") from error
    if len({name.split("/")[0] for name in names}) != 1 or set(found) != {name.partition("/")[2] for name in names}:
        raise UnsafePackageError("its list of parts is not the same for every reader")
    return found


def _json(parts: dict[str, bytes], name: str) -> Any:
    try:
        return json.loads(parts[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: {error}") from error


def _check_payload(name: str, content: Any) -> None:
    entries = content.get("config") if isinstance(content, dict) else None
    if not isinstance(entries, dict):
        raise UnsafePackageError(f"{name} is no table of tensors")
    for key, entry in entries.items():
        path = entry.get("path_name") if isinstance(entry, dict) else None
        if not isinstance(path, str) or not re.fullmatch(r"(weight|tensor)_\d+", path):
            raise UnsafePackageError(f"{key!r} of {name} is no tensor")
        if entry.get("use_pickle") is not False:
            raise UnsafePackageError(f"{key!r} of {name} is pickled")


def _values(content: Any, keys: tuple[str, ...]) -> Iterator[Any]:
    """All values with some keys, at any depth."""
    stack = [content]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            yield from (node[key] for key in keys if key in node)
            stack += node.values()
        elif isinstance(node, list):
            stack += node


def check_function(target: Any) -> None:
    """Raise unless a graph's function is an operator on tensors that touches no file, or arithmetic.

    Raises:
        UnsafePackageError: it is something else.
    """
    match = OPERATOR.fullmatch(target) if isinstance(target, str) else None
    if match is None:
        if not isinstance(target, str) or not FUNCTIONS.fullmatch(target):
            raise UnsafePackageError(f"the program calls {target!r}")
        return
    namespace, name, overload = match.groups()
    packet = getattr(getattr(torch.ops, namespace), name, None)
    operator = getattr(packet, overload, None)
    schema = getattr(operator, "_schema", None)
    if schema is None:
        raise UnsafePackageError(f"the program calls {target!r}, which this torch does not have")
    given = [str(argument.name) for argument in schema.arguments]
    if name in ("from_file", "save") or {"filename", "path", "file"} & set(given):
        raise UnsafePackageError(f"the program calls {target!r}, which opens files")


def check_expression(text: Any) -> None:
    """Raise unless an expression of sizes is arithmetic on symbols and numbers.

    Raises:
        UnsafePackageError: it is something else.
    """
    shown = repr(text)[:80]
    if not isinstance(text, str) or len(text) > MAX_EXPRESSION:
        raise UnsafePackageError(f"{shown} is no expression of sizes")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnsafePackageError(f"{shown} is no expression of sizes") from error
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            if not CALLS.fullmatch(name):
                raise UnsafePackageError(f"the expression {shown} calls {name or 'what it computes'}")
            # Symbol('s0', integer=True), Float('1.5', precision=53).
            texts = {"Symbol": SYMBOL, "Float": NUMBER}.get(name)
            stack += [x for x in node.args if texts is None or not _is_text(x, texts)]
            stack += [word.value for word in node.keywords]
        elif isinstance(node, ast.Name):
            if not SYMBOL.fullmatch(node.id) and node.id not in ("true", "false"):
                raise UnsafePackageError(f"the expression {shown} names {node.id}")
        elif isinstance(node, ast.Constant):
            if not isinstance(node.value, (int, float)):
                raise UnsafePackageError(f"the expression {shown} holds text")
        elif isinstance(node, NODES):
            stack += ast.iter_child_nodes(node)
        else:
            raise UnsafePackageError(f"the expression {shown} is more than arithmetic")


def _is_text(node: ast.AST, pattern: re.Pattern[str]) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(pattern.fullmatch(node.value))
