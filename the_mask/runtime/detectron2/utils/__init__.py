"""Helpers: communication, events, logging, seeds, files, registries."""

from .._missing import not_provided

__getattr__ = not_provided(__name__)
