"""Archives: a manifest of videos, segmented by many workers, each video exactly once even if processes are killed.

``manifest.py`` reads the tasks and ``results.py`` records the finished ones; ``worker.py`` segments one video;
``dispatch.py`` hands videos to workers, which are processes of this machine (``local.py``) or actors of a Ray cluster
(``ray_cluster.py``); ``engines.py`` has their names.
"""

from the_mask.inference.archive.dispatch import Summary, segment_archive
from the_mask.inference.archive.engines import ENGINES, make_workers
from the_mask.inference.archive.manifest import VideoOptions, VideoTask, read_manifest
from the_mask.inference.archive.results import Results
from the_mask.inference.archive.worker import WorkerSetup

__all__ = [
    "ENGINES",
    "Results",
    "Summary",
    "VideoOptions",
    "VideoTask",
    "WorkerSetup",
    "make_workers",
    "read_manifest",
    "segment_archive",
]
