"""Shared test set-up: the_mask is imported before anything imports detectron2."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import the_mask  # noqa: F401
