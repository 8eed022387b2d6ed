"""Inference: runners that wrap a segmentor."""

from the_mask.inference.stream import StreamingSegmentor

__all__ = ["StreamingSegmentor"]
