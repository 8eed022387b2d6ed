"""List the models and the configs that come with the library.

the-mask models
the-mask models street-live
the-mask models --configs camvid
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument(
        "name", nargs="?", default="", help="show the card of this model; with --configs, list names that contain this"
    )
    parser.add_argument("--configs", action="store_true", help="list the names for --config")


def run(args: argparse.Namespace) -> None:
    """Print names, or a card."""
    if args.configs:
        from the_mask.config import config_names

        found = [name for name in config_names() if args.name in name]
        if not found:
            raise ValueError(f"no config has {args.name!r} in its name; `the-mask models --configs` lists all")
        print("\n".join(found))
        return
    import yaml

    from the_mask.models import model_names, read_card

    if args.name:
        card = read_card(args.name)
        print(yaml.safe_dump(card.facts, sort_keys=False, allow_unicode=True, width=120) + "\n" + card.text, end="")
        return
    names = model_names()
    if not names:
        print("no model comes with this installation")
    for name in names:
        print(f"{name:<24}{read_card(name).facts.get('summary', '')}")
