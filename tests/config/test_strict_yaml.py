"""YAML without keys given twice, bombs or code; errors name file and line."""

from __future__ import annotations

import time

import pytest
import yaml

from the_mask.config import load_config
from the_mask.config.strict_yaml import parse_yaml


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("SOLVER:\n  MAX_ITER: 3\nSEED: 1\nSOLVER:\n  BASE_LR: 0.1\n", "SOLVER", (1, 4)),
        ("SOLVER:\n  MAX_ITER: 3\n  MAX_ITER: 4\n", "MAX_ITER", (2, 3)),
        ("A: [1, {B: 1, C: 2, B: 3}]", "B", (1, 1)),
        ("A: &x {B: 1}\nC:\n  <<: *x\n  <<: *x\n", "<<", (3, 4)),
        ('A: 1\n"A": 2\n', "A", (1, 2)),
    ],
)
def test_a_key_given_twice_is_named_with_both_lines(text: str, key: str, lines: tuple[int, int]) -> None:
    message = rf"some.yaml: key {key} is given twice, in lines {lines[0]} and {lines[1]}"
    with pytest.raises(ValueError, match=message):
        parse_yaml(text, "some.yaml")
    with pytest.raises(ValueError, match=message):
        parse_yaml(text, "some.yaml", allow_unsafe=True)


def test_keys_that_override_merged_ones_are_no_repetition() -> None:
    assert parse_yaml("A: &x {B: 1, C: 1}\nD: {<<: *x, B: 2}\n")["D"] == {"B": 2, "C": 1}


def test_alias_bombs_are_found_before_they_go_off() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    start = time.process_time()
    with pytest.raises(ValueError, match=r"bomb.yaml, line \d+: aliases multiply to more than 100000 values"):
        parse_yaml("\n".join(levels), "bomb.yaml")
    assert time.process_time() - start < 1
    with pytest.raises(ValueError, match=r"bomb.yaml, line 1: an alias leads back"):
        parse_yaml("a: &a [1, *a]", "bomb.yaml")
    with pytest.raises(ValueError, match="nested too deep"):
        parse_yaml("[" * 5000 + "]" * 5000)
    with pytest.raises(ValueError, match="more than the"):
        parse_yaml("a: " + "x" * (5 << 20))


def test_other_encodings() -> None:
    assert parse_yaml("﻿A: é".encode()) == {"A": "é"}
    assert parse_yaml("A: é".encode("utf-16")) == {"A": "é"}
    with pytest.raises(ValueError, match=r"some.yaml: not valid YAML: .*00e9"):
        parse_yaml("A: é".encode("cp1252"), "some.yaml")


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "a: 1", "[1, 2.5, null, true, ~, 2001-12-14]", "a: {b: [c, 'd']}\n", "x: !!str 5"]
)
def test_everything_else_is_what_pyyaml_says(text: str) -> None:
    assert parse_yaml(text) == yaml.safe_load(text)
    dumped = load_config().dump()
    assert parse_yaml(dumped) == yaml.safe_load(dumped)
