"""CONTRIBUTING's map is the real tree, and the pages name files that exist."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

from the_mask.config.compose import find_config

ROOT = Path(__file__).parents[2]
MAP = ROOT / "CONTRIBUTING.md"
TOP = r"(?:the_mask|tools|benchmarks|tests|configs|csrc|datasets|docs)"
NAMED = re.compile(rf"(?<![\w/.-])({TOP}/[\w./*{{}},-]*)")
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("[!.]*/README.md")]
)
# Records of past commits, whose files may be gone.
HISTORY = {"CHANGELOG.md", "docs/experiments.md"}


@cache
def tracked() -> tuple[PurePosixPath, ...]:
    """Files of the checkout, relative to its root; none outside a checkout."""
    try:
        found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ()
    return tuple(PurePosixPath(name.decode()) for name in found.split(b"\0") if name)


def exists(root: Path, pattern: str) -> bool:
    """Whether a file or folder is there, or is one of the checkout's.

    Git removes the files that it changes and writes them anew: while a branch is merged or rebased, one may be absent.
    """
    if any(root.glob(pattern)):
        return True
    depth = pattern.count("/") + 1
    known = {PurePosixPath(*file.parts[:depth]) for file in tracked() if len(file.parts) >= depth}
    return root == ROOT and any(path.match(pattern) for path in known)


def rows(text: str) -> list[tuple[list[str], str]]:
    """The map's rows: the folders of the first cell, and the text of the second."""
    table = text.split("## Map")[1].split("\n## ")[0]
    cells = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", first), second) for first, second, *_ in cells]


def missing(root: Path, folders: list[str], contents: str) -> list[str]:
    """What a row names and the tree does not have; names of the second cell may be below any of the row's folders."""
    lost = [folder for folder in folders if not (folder.endswith("/") and (root / folder).is_dir())]
    for name in re.findall(r"`([\w./-]+(?:/|\.py|\.md))`", contents):
        if not any((base / name).exists() for base in [root, *(root / folder for folder in folders)]):
            lost.append(name)
    return lost


def is_config(name: str) -> bool:
    try:
        find_config(name)
    except FileNotFoundError:
        return False
    return True


def lost_names(root: Path, text: str) -> list[str]:
    """Paths of the repository that a page names in code and that do not exist.

    ``*`` and ``{a,b}`` are patterns; a config may be a row of its folder's ``models.yaml``.
    """
    lost = []
    for code in re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL):
        for name in NAMED.findall(code):
            pattern = re.sub(r"\{[^}]*\}", "*", name.rstrip(".,"))
            if exists(root, pattern.rstrip("/")) or (name.startswith("configs/") and is_config(name)):
                continue
            lost.append(name)
    return lost


def test_folders_of_the_map_exist() -> None:
    found = rows(MAP.read_text())
    assert len(found) > 15
    assert [name for folders, contents in found for name in missing(ROOT, folders, contents)] == []


def test_map_names_every_folder() -> None:
    named = [folder for folders, _ in rows(MAP.read_text()) for folder in folders]
    if not tracked():
        pytest.skip("not a git checkout")
    files = [path for path in tracked() if not path.parts[0].startswith(".")]
    wanted = {f"{path.parts[0]}/" for path in files if len(path.parts) > 1}
    for package in ("the_mask", "the_mask/modeling"):
        depth = package.count("/") + 1
        inside = [path for path in files if path.as_posix().startswith(f"{package}/")]
        wanted |= {f"{package}/{path.parts[depth]}/" for path in inside if len(path.parts) > depth + 1}
    assert {folder for folder in wanted if not any(name.startswith(folder) for name in named)} == set()


def test_links_lead_to_files() -> None:
    lost = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text()):
            if "://" not in target and not (ROOT / page).parent.joinpath(target).exists():
                lost.append(f"{page}: {target}")
    assert lost == []


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_real_files(page: str) -> None:
    if page in HISTORY:
        pytest.skip("records past commits")
    assert lost_names(ROOT, (ROOT / page).read_text()) == []


def test_a_file_that_git_is_writing_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge, or a rebase, takes files away for a moment."""
    if not tracked():
        pytest.skip("not a git checkout")
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter(()))
    assert lost_names(ROOT, "`tests/data/test_files.py` `tests/docs/` `tests/{a,docs}/test_*.py`") == []
    assert lost_names(ROOT, "`tests/gone.py` `docs/test_map.py`") == ["tests/gone.py", "docs/test_map.py"]


def test_the_checks_find_errors(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "a.py").touch()
    assert missing(tmp_path, ["tools/", "gone/", "tools"], "`a.py` and `b.py`") == ["gone/", "tools", "b.py"]
    page = "`tools/a.py --x` `python tools/b.py`\n```bash\ntools/c.py\n```\n`tools/{a,b}.py` `docs/*.md` `https://x/tools/d.py`"
    assert lost_names(tmp_path, page) == ["tools/b.py", "tools/c.py", "docs/*.md"]
