"""Inference: streams built around a segmentor, live sources, runtimes, and rendering of results."""

from the_mask.inference.live.many_streams import StreamEngine
from the_mask.inference.merge import merge_scores, normalize_scores
from the_mask.inference.stream import StreamingSegmentor
from the_mask.inference.views import MultiView, View, make_views
from the_mask.inference.window import SlidingWindow

__all__ = [
    "MultiView",
    "SlidingWindow",
    "StreamEngine",
    "StreamingSegmentor",
    "View",
    "make_views",
    "merge_scores",
    "normalize_scores",
]
