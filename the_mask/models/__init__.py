"""Trained models that come with the library.

A model ``NAME`` has three files: ``NAME.safetensors`` (weights in float16), ``NAME.yaml`` (the complete config) and
``NAME.md``, its card: training data and recipe, metrics, known failures, licence of the data, and the digest of the
weights. ``tools/pack_model.py`` writes them, ``the_mask.load(NAME)`` reads them.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from the_mask.config import load_config
from the_mask.config.strict_yaml import parse_yaml
from the_mask.data.files import file_digest, read_text
from the_mask.data.schema import Each, Maybe, Number, check_schema

FOLDER = Path(__file__).resolve().parent
# What programs take from a card; everything else in it is for people.
FACTS: dict[str, Any] = {
    "sha256": (str, int),  # YAML takes sixty-four digits for a number
    "classes": Maybe(Each(list, str)),
    "colors": Maybe(Each(list, Each(list, Number(0, 255), least=3, most=3))),
}


@dataclass(frozen=True)
class Card:
    """The card of a model.

    Attributes:
        name: of the model.
        facts: the front matter: ``summary``, ``sha256``, ``parameters``, ``data``, ``licence``, ``metrics`` and so on.
        text: the text below it, Markdown.
    """

    name: str
    facts: dict[str, Any]
    text: str


def model_names() -> list[str]:
    """Names of the models that come with the library."""
    return sorted(path.stem for path in FOLDER.glob("*.md"))


def read_card(name: str) -> Card:
    """Read the card of a model.

    Raises:
        ValueError: no model of this name (the message has similar names), or a damaged card.
    """
    known = model_names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise ValueError(f"no model {name!r} comes with the library; {hint}known: {', '.join(known) or 'none'}")
    return parse_card(name, read_text(FOLDER / f"{name}.md", "card"))


def parse_card(name: str, content: str) -> Card:
    """Parse a card: front matter between two lines ``---``, then text.

    Raises:
        ValueError: another layout, or facts without the digest of the weights.
    """
    start, front, text = ("", "", "")
    if content.count("---\n") >= 2:
        start, front, text = content.split("---\n", 2)
    facts = parse_yaml(front, f"card of {name}")
    if start or not isinstance(facts, dict) or "sha256" not in facts:
        raise ValueError(f"the card of {name} is damaged: it does not begin with facts that name a sha256")
    check_schema(facts, FACTS, f"the card of {name} is damaged")
    return Card(name, facts, text.lstrip("\n"))


def model_config(name: str, overrides: list[str] | None = None) -> CfgNode:
    """The config of a model, with ``MODEL.WEIGHTS`` set to its file after checking it.

    Args:
        name: one of :func:`model_names`.
        overrides: flat list ``[KEY, VALUE, ...]`` on top.

    Raises:
        ValueError: unknown name, or weights that do not match the card.
        FileNotFoundError: the file is missing.
    """
    return load_config(FOLDER / f"{name}.yaml", ["MODEL.WEIGHTS", str(model_weights(name)), *(overrides or [])])


def model_weights(name: str) -> Path:
    """The weights file of a model, after checking it.

    Args:
        name: one of :func:`model_names`.

    Raises:
        ValueError: unknown name, or weights that do not match the card.
        FileNotFoundError: the file is missing.
    """
    path = FOLDER / f"{name}.safetensors"
    check_digest(path, str(read_card(name).facts["sha256"]))
    return path


def check_digest(path: Path, expected: str, remedy: str = "install the package again") -> None:
    """Raise unless a file has this SHA-256; ``remedy`` tells the user what to do.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another content.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the installation is incomplete, {remedy}")
    found = file_digest(path)
    if found != expected:
        raise ValueError(f"{path} is damaged: its SHA-256 is {found}, the card says {expected}; {remedy}")
