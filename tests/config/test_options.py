"""Options: typed values of keys, whose defaults, validation and table come from one place."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from the_mask.config import add_the_mask_config, allowed_values, load_config
from the_mask.config.compose import flat_keys
from the_mask.config.keys import SUBJECTS, subject_options
from the_mask.config.options import Options, one_of, option, value_problems, within
from the_mask.config.table import config_table, meanings


class Toy(Options, group="A"):
    """A toy."""

    # What it is.
    kind: str = one_of("x", "y")
    share: float = within(0.5, 0, 1)
    # How many, and
    # of what.
    count: int = within(3, least=1, key="B.COUNT")
    free: tuple[int, ...] = option((1, 2), key="A.LIST")
    plain: float | None = None

    def check(self) -> None:
        if self.kind == "y" and self.count == 1:
            raise ValueError("A.KIND y needs a B.COUNT above 1")


class MoreToy(Toy, group="C"):
    """More of it."""

    own: int = 7


ALLOWED = {key: field.metadata["allowed"] for key, field in Toy.config_keys.items() if field.metadata.get("allowed")}


def config() -> CfgNode:
    cfg = CfgNode({"B": {"COUNT": 9, "OTHER": 1}})
    Toy.add_to(cfg)
    return cfg


def test_keys_and_defaults() -> None:
    wanted = {"A": {"KIND": "x", "SHARE": 0.5, "LIST": [1, 2], "PLAIN": None}, "B": {"COUNT": 3, "OTHER": 1}}
    assert config() == wanted
    assert Toy.from_config(config()) == Toy()
    assert (Toy().kind, Toy().share, Toy().count, Toy().free, Toy().plain) == ("x", 0.5, 3, (1, 2), None)


def test_a_config_is_read() -> None:
    cfg = config()
    cfg.merge_from_list(["A.KIND", "y", "B.COUNT", 4, "A.LIST", "[5]"])
    found = Toy.from_config(cfg)
    assert found == Toy(kind="y", count=4, free=(5,)) != Toy()
    assert found.free == (5,), "lists become tuples, as those that are given: the options do not change"
    assert hash(found) == hash(Toy(kind="y", count=4, free=[5]))  # type: ignore[arg-type]
    assert "kind='y'" in repr(found)


def test_a_subclass_has_the_keys_of_its_own_group() -> None:
    assert list(MoreToy.config_keys) == ["C.KIND", "C.SHARE", "B.COUNT", "A.LIST", "C.PLAIN", "C.OWN"]
    assert MoreToy(own=1, kind="y").own == 1
    assert meanings(MoreToy) == {
        "kind": "What it is.",
        "share": "",
        "count": "How many, and of what.",
        "free": "",
        "plain": "",
        "own": "",
    }


def test_options_do_not_change() -> None:
    toy = Toy(share=0.25)
    with pytest.raises(FrozenInstanceError, match="'share'"):
        toy.share = 0.5  # type: ignore[misc]
    assert replace(toy, kind="y") == Toy(kind="y", share=0.25)
    assert copy.deepcopy(toy) == pickle.loads(pickle.dumps(toy)) == toy


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "z"}, "A.KIND 'z': expected one of 'x', 'y'"),
        ({"share": 1.5}, "A.SHARE 1.5: expected a number in 0..1"),
        ({"share": -0.1}, "A.SHARE -0.1: expected a number in 0..1"),
        ({"count": 0}, "B.COUNT 0: expected a number >= 1"),
    ],
)
def test_values_that_are_not_allowed_are_named(values: dict[str, object], message: str) -> None:
    cfg = config()
    assert list(value_problems(cfg, ALLOWED)) == []
    for name, value in values.items():
        cfg.merge_from_list([next(key for key, field in Toy.config_keys.items() if field.name == name), value])
    assert list(value_problems(cfg, ALLOWED)) == [message]
    for make in (lambda: Toy.from_config(cfg), lambda: Toy(**values)):  # type: ignore[arg-type]
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            make()
        assert str(caught.value) == message


def test_values_that_do_not_go_together_and_unknown_ones() -> None:
    with pytest.raises(ValueError, match=r"A\.KIND y needs a B\.COUNT above 1"):
        Toy(kind="y", count=1)
    with pytest.raises(TypeError, match="Toy has no option kinds; it has kind, share, count, free, plain"):
        Toy(kinds="y")  # type: ignore[call-arg]


def test_the_defaults_are_allowed_and_plain() -> None:
    cfg = load_config()
    assert len(allowed_values()) > 50
    assert list(value_problems(cfg, allowed_values())) == []
    assert {type(value) for _, value in flat_keys(cfg)} <= {int, float, bool, str, list, tuple, type(None)}
    cfg = get_cfg()
    add_the_mask_config(cfg)
    for subject in SUBJECTS:
        for options in subject_options(subject):
            assert options.from_config(cfg) == options(), f"{options.__name__} disagrees with another class"


def test_every_key_is_declared_once() -> None:
    declared = Counter(
        key
        for subject in SUBJECTS
        for options in subject_options(subject)
        for key, field in options.config_keys.items()
        if not any(key in getattr(base, "config_keys", {}) for base in options.__bases__)
    )
    assert [key for key, times in declared.items() if times > 1] == []


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
    # A class is a table of its own, under its docstring.
    assert "### `SOLVER.LR_DECAY`: Learning rates that fall from the head to the stem" in table


def test_the_page_has_the_keys_and_defaults() -> None:
    page = (Path(__file__).parents[2] / "docs/config.md").read_text(encoding="utf-8")
    wanted, found = (
        {tuple(line.split(" | ")[:2]) for line in text.splitlines() if line.startswith("| `")}
        for text in (config_table(), page)
    )
    assert found == wanted, "run python -m the_mask.config.table > docs/config.md"
