"""Every key of the_mask as Markdown tables: ``python -m the_mask.config.table > docs/config.md``.

Made from the classes of ``keys/``: their docstrings, and the comments above their fields.
"""

from __future__ import annotations

import ast
import inspect
import textwrap

from the_mask.config.keys import SUBJECTS, subject_options
from the_mask.config.options import Options

HEADER = """# Config keys

Made by `python -m the_mask.config.table`; the keys of Detectron2 itself are in its documentation.
"""


def config_table() -> str:
    """One section per subject, one table per class of options, one row per key."""
    parts, shown = [HEADER], set[str]()
    for subject in SUBJECTS:
        parts.append(f"## {_first_line(subject)}\n")
        for options in subject_options(subject):
            comments = meanings(options)
            parts.append(f"### `{options.group}`: {' '.join((inspect.getdoc(options) or '').split())}\n")
            rows = []
            for key, field in options.config_keys.items():
                allowed, value = field.metadata.get("allowed"), field.default
                value = list(value) if isinstance(value, tuple) else value
                words = [comments[field.name]] if comments[field.name] else []
                words += [f"Allowed: {allowed}."] if allowed else []
                if key not in shown:
                    rows.append(f"| `{key}` | `{value!r}` | {' '.join(words).replace('|', chr(92) + '|')} |")
                shown.add(key)
            parts += ["| key | default | meaning |\n|---|---|---|", *rows, ""] if rows else []
    return "\n".join(parts)


def _first_line(subject: object) -> str:
    return (inspect.getdoc(subject) or "").split("\n", 1)[0].rstrip(".")


def meanings(options: type[Options]) -> dict[str, str]:
    """Field -> the comment above it, or "" where it shares that of the field before; inherited fields first."""
    found: dict[str, str] = {}
    for cls in reversed(options.__mro__[: options.__mro__.index(Options)]):
        source = textwrap.dedent(inspect.getsource(cls))
        lines = source.splitlines()
        body = ast.parse(source).body[0]
        assert isinstance(body, ast.ClassDef)
        for node in body.body:
            if not isinstance(node, ast.AnnAssign):
                continue
            comment: list[str] = []
            line = node.lineno - 2
            while lines[line].strip().startswith("#"):
                comment.insert(0, lines[line].strip().lstrip("# "))
                line -= 1
            found[ast.unparse(node.target)] = " ".join(comment)
    return found


if __name__ == "__main__":
    print(config_table(), end="")
