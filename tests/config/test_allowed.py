"""Keys declared with what they may be: defaults, validation and the table come from one place."""

from __future__ import annotations

from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from the_mask.config import add_the_mask_config, allowed_values, load_config
from the_mask.config.allowed import add_and_record, one_of, value_problems, within
from the_mask.config.compose import flat_keys
from the_mask.config.table import config_table


def declared(cfg: CfgNode) -> None:
    cfg.A = CfgNode()
    cfg.A.KIND = one_of("x", "y")
    cfg.A.SHARE = within(0.5, 0, 1)
    cfg.A.COUNT = within(cfg.B.COUNT, least=1)
    group = cfg.A
    group.FREE = [1, 2]


def test_defaults_and_limits_are_taken_apart() -> None:
    cfg = CfgNode({"B": {"COUNT": 3}})
    allowed = add_and_record(cfg, iter([declared]))
    assert cfg == {"B": {"COUNT": 3}, "A": {"KIND": "x", "SHARE": 0.5, "COUNT": 3, "FREE": [1, 2]}}
    assert list(allowed) == ["A.KIND", "A.SHARE", "A.COUNT"]
    assert list(value_problems(cfg, allowed)) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("KIND", "z", "A.KIND 'z': expected one of 'x', 'y'"),
        ("SHARE", 1.5, "A.SHARE 1.5: expected a number in 0..1"),
        ("SHARE", -0.1, "A.SHARE -0.1: expected a number in 0..1"),
        ("COUNT", 0, "A.COUNT 0: expected a number >= 1"),
    ],
)
def test_other_values_are_named(key: str, value: object, message: str) -> None:
    cfg = CfgNode({"B": {"COUNT": 3}})
    allowed = add_and_record(cfg, iter([declared]))
    cfg.A[key] = value
    assert list(value_problems(cfg, allowed)) == [message]


def test_the_defaults_are_allowed_and_plain() -> None:
    cfg = load_config()
    assert len(allowed_values()) > 50
    assert list(value_problems(cfg, allowed_values())) == []
    assert {type(value) for _, value in flat_keys(cfg)} <= {int, float, bool, str, list, tuple, type(None)}


def test_the_table_has_every_key_that_is_added() -> None:
    before, after = get_cfg(), get_cfg()
    add_the_mask_config(after)
    added = set(dict(flat_keys(after))) - set(dict(flat_keys(before)))
    rows = [line.split("`")[1] for line in config_table().splitlines() if line.startswith("| `")]
    assert added <= set(rows)
    assert len(rows) == len(set(rows))


def test_meanings_are_the_comments() -> None:
    table = config_table()
    assert (
        "| `SOLVER.CHECKPOINT_KEEP` | `2` | Periodic checkpoints kept (0: all); the best and the last are always kept. "
        "Allowed: a number >= 0. |" in table
    )
    # A group's comment is that of its first key.
    assert "| `SOLVER.LR_DECAY.MODE` | `'none'` | Learning rates that fall from the head to the stem" in table


def test_the_page_has_the_keys_and_defaults() -> None:
    page = (Path(__file__).parents[2] / "docs/config.md").read_text(encoding="utf-8")
    wanted, found = (
        {tuple(line.split(" | ")[:2]) for line in text.splitlines() if line.startswith("| `")}
        for text in (config_table(), page)
    )
    assert found == wanted, "run python -m the_mask.config.table > docs/config.md"
