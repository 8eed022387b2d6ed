"""Inference: runners that wrap a segmentor."""

from the_mask.inference.live.many_streams import StreamEngine
from the_mask.inference.merge import merge_scores, normalize_scores
from the_mask.inference.stream import StreamingSegmentor
from the_mask.inference.views import View, ViewRunner, make_views
from the_mask.inference.window import WindowRunner

__all__ = [
    "StreamEngine",
    "StreamingSegmentor",
    "View",
    "ViewRunner",
    "WindowRunner",
    "make_views",
    "merge_scores",
    "normalize_scores",
]
