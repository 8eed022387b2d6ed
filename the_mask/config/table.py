"""Every key of the_mask as a Markdown table: ``python -m the_mask.config.table > docs/config.md``.

Meanings are the comments above the keys in ``keys/``; defaults and allowed values are those assigned there.
"""

from __future__ import annotations

import ast
import inspect
from types import ModuleType

from detectron2.config import get_cfg

from the_mask.config import add_the_mask_config, allowed_values
from the_mask.config.compose import flat_keys
from the_mask.config.keys import SUBJECTS

HEADER = """# Config keys

Made by `python -m the_mask.config.table`; the keys of Detectron2 itself are in its documentation.
"""


def config_table() -> str:
    """One section per subject, one row per key."""
    cfg = get_cfg()
    add_the_mask_config(cfg)
    defaults, allowed = dict(flat_keys(cfg)), allowed_values()
    parts = [HEADER]
    for subject in SUBJECTS:
        title = (inspect.getdoc(subject) or "").split("\n", 1)[0].rstrip(".")
        parts.append(f"## {title}\n\n| key | default | meaning |\n|---|---|---|")
        for key, meaning in meanings(subject).items():
            values = {key: defaults[key]} if key in defaults else {}
            # A group assigned as a whole gives one row per key.
            values = values or {name: value for name, value in defaults.items() if name.startswith(f"{key}.")}
            for name, value in values.items():
                words = [meaning] if meaning else []
                words += [f"Allowed: {allowed[name]}."] if name in allowed else []
                parts.append(f"| `{name}` | `{value!r}` | {' '.join(words).replace('|', chr(92) + '|')} |")
        parts.append("")
    return "\n".join(parts)


def meanings(subject: ModuleType) -> dict[str, str]:
    """The comment above each key, in order; "" if it shares the comment of the previous key."""
    source = inspect.getsource(subject)
    lines = source.splitlines()
    function = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "add_keys")
    names, found, group = {"cfg": ""}, {}, ""
    for node in function.body:
        if not isinstance(node, ast.Assign):
            continue
        target, value = ast.unparse(node.targets[0]), ast.unparse(node.value)
        if isinstance(node.targets[0], ast.Name):
            # blocks = cfg.MODEL.BLOCKS
            names[target] = value.partition(".")[2]
            continue
        comment: list[str] = []
        line = node.lineno - 2
        while lines[line].strip().startswith("#"):
            comment.insert(0, lines[line].strip().lstrip("# "))
            line -= 1
        first, _, rest = target.partition(".")
        key, text = f"{names[first]}.{rest}".lstrip("."), " ".join(comment)
        if value in ("CfgNode()", "CfgNode(new_allowed=True)"):
            # The comment of a group belongs to its first key.
            group = text
            continue
        found[key], group = " ".join(part for part in (group, text) if part), ""
    return found


if __name__ == "__main__":
    print(config_table(), end="")
