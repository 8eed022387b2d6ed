"""The order of the rooms: no file imports one from a room above its own, and no two files import each other.

Imports inside functions count: they hide a circle, they do not remove it. Imports for type checkers alone do not.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "the_mask"
# From the ground up; a room may import itself and those before it. Rooms on one line do not import each other.
ROOMS: tuple[tuple[str, ...], ...] = (
    ("_detectron2", "config", "ops"),
    ("data",),
    ("models",),
    ("modeling",),
    ("weights", "export"),
    ("inference",),
    ("env", "evaluation"),
    ("engine",),
    ("cli",),
    ("__main__",),
)
# The same inside the_mask/modeling; its other files may be imported from everywhere in it.
FAMILIES = (("backbones",), ("mask", "pixel"), ("propagation",))
# "importer imported": why it still stands. To be emptied.
KNOWN: dict[str, str] = {}


def modules(root: Path) -> dict[str, Path]:
    """Module name -> file, the embedded runtime left out."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if "runtime" not in parts:
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, names: Mapping[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports when it runs, at its top or inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from (name for child in node.orelse for name in imports(child, names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not used"
            base = node.module or ""
            yield from (f"{base}.{a.name}" if f"{base}.{a.name}" in names else base for a in node.names)
        else:
            yield from imports(node, names)


def graph(root: Path) -> dict[str, set[str]]:
    """Module -> modules that it imports, with the packages that Python runs on the way to them.

    A file that imports its neighbour does not run the package of both once more, so that one is left out.
    """
    names = modules(root)
    found: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        for target in imports(ast.parse(path.read_text(encoding="utf-8")), names):
            while target in names:
                if target != name and not name.startswith(f"{target}."):
                    found[name].add(target)
                target = target.rpartition(".")[0]
    return found


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other (strongly connected components of more than one)."""
    reach: dict[str, set[str]] = {}
    for start in edges:
        seen: set[str] = set()
        stack = [start]
        while stack:
            new = edges[stack.pop()] - seen
            seen |= new
            stack += new
        reach[start] = seen
    groups = {frozenset(b for b in reach[a] if a in reach[b]) for a in edges if a in reach[a]}
    return sorted(sorted(group) for group in groups)


def level(name: str, order: tuple[tuple[str, ...], ...], depth: int) -> tuple[int, str]:
    """Place of a module in an order of rooms, -1 when it is in none, and its room."""
    parts = name.split(".")
    room = parts[depth] if len(parts) > depth else ""
    return next((i for i, rooms in enumerate(order) if room in rooms), -1), room


def wrong_way(edges: Mapping[str, set[str]]) -> set[str]:
    """Imports that go up, or sideways between rooms of one level."""
    found = set()
    for importer, targets in edges.items():
        for target in targets:
            for prefix, order, depth in ((PACKAGE, ROOMS, 1), (f"{PACKAGE}.modeling", FAMILIES, 2)):
                if not importer.startswith(f"{prefix}.") or not target.startswith(f"{prefix}."):
                    continue
                (mine, own), (theirs, other) = level(importer, order, depth), level(target, order, depth)
                if 0 <= mine <= theirs and own != other:
                    found.add(f"{importer} {target}")
    return found


def test_every_file_has_a_room() -> None:
    rooms = {name.split(".")[1] for name in modules(ROOT) if "." in name}
    assert rooms <= {room for row in ROOMS for room in row}, "a new room: give it a place in ROOMS"


def test_imports_follow_the_order_of_rooms() -> None:
    found = wrong_way(graph(ROOT))
    assert found - KNOWN.keys() == set()
    assert KNOWN.keys() - found == set(), "mended: take it off the list"


def test_no_files_import_each_other() -> None:
    assert circles(graph(ROOT)) == []


def test_streams_of_arrays_need_no_video_library() -> None:
    code = (
        "import sys, torch\nfrom the_mask.config import load_config\n"
        "from the_mask.inference.stream import build_random\n"
        "model = build_random(load_config('configs/debug/the_mask_debug_video.yaml', ['MODEL.DEVICE', 'cpu']))\n"
        "model.step(torch.zeros(3, 64, 96, dtype=torch.uint8), model.init_state())\n"
        "sys.exit(', '.join({'av', 'cv2'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_found(tmp_path: Path) -> None:
    files = {
        "data/__init__.py": "from the_mask.data.a import x",
        "data/a.py": "def f():\n    from the_mask.engine.b import y\n",
        "engine/__init__.py": "",
        "engine/b.py": "import the_mask.data\nif TYPE_CHECKING:\n    from the_mask.engine.c import z\n",
        "engine/c.py": "from the_mask.engine import b",
        "modeling/mask/m.py": "from the_mask.modeling.pixel import p",
        "modeling/pixel/p.py": "from the_mask.ops import o",
        "ops/o.py": "import torch",
    }
    for name, text in files.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    edges = graph(tmp_path)
    assert wrong_way(edges) == {
        "the_mask.data.a the_mask.engine.b",
        "the_mask.data.a the_mask.engine",
        "the_mask.modeling.mask.m the_mask.modeling.pixel.p",
    }
    assert circles(edges) == [["the_mask.data", "the_mask.data.a", "the_mask.engine.b"]]
