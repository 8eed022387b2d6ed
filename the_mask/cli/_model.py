"""The trained model that a command line names."""

from __future__ import annotations

import argparse
from typing import Any

from the_mask.cli import _options

DEFAULT_MODEL = "street-live"


def model_and_palette(args: argparse.Namespace) -> tuple[Any, Any]:
    """The config of a trained model, and the names and colours of its classes.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: see :func:`the_mask.inference.load.find_model`.
    """
    from the_mask.config import load_config
    from the_mask.inference.demo import palette_from_config
    from the_mask.inference.load import find_model
    from the_mask.inference.rendering.render import Palette

    overrides = _options.with_weights(args)
    if args.config_file:
        cfg, card = load_config(args.config_file, overrides), None
    else:
        cfg, card = find_model(args.model or default_model(), overrides, getattr(args, "refresh", False))
    dataset = getattr(args, "dataset", "")
    if dataset:
        palette = palette_from_config(cfg, dataset)
        cfg.DATASETS.TEST = (dataset,)  # the weights are checked against its classes
        return cfg, palette
    facts = card.facts if card is not None else {}
    names, colors = facts.get("classes"), facts.get("colors")
    if names and colors and len(names) == len(colors) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
        return cfg, Palette(names, colors, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)
    return cfg, palette_from_config(cfg)


def default_model() -> str:
    """The default model.

    Raises:
        ValueError: this installation has no model.
    """
    from the_mask.models import model_names

    names = model_names()
    if not names:
        raise ValueError("no model comes with this installation: give --model or --config with --weights")
    return DEFAULT_MODEL if DEFAULT_MODEL in names else names[0]
