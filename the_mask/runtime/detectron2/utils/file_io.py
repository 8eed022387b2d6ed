"""``PathManager``: one object that opens local files, http(s) URLs and ``detectron2://`` paths."""

from __future__ import annotations

from typing import IO, Any

from iopath.common.file_io import HTTPURLHandler, OneDrivePathHandler, PathHandler
from iopath.common.file_io import PathManager as PathManagerBase

__all__ = ["PathHandler", "PathManager"]


class Detectron2Handler(PathHandler):
    """``detectron2://x`` is a file of Detectron2's model zoo."""

    PREFIX = "detectron2://"
    S3_DETECTRON2_PREFIX = "https://dl.fbaipublicfiles.com/detectron2/"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, **kwargs: Any) -> str:
        return PathManager.get_local_path(self.S3_DETECTRON2_PREFIX + path[len(self.PREFIX) :], **kwargs)

    def _open(self, path: str, mode: str = "r", **kwargs: Any) -> IO[Any]:
        return PathManager.open(self._get_local_path(path), mode, **kwargs)


PathManager = PathManagerBase()
for _handler in (HTTPURLHandler(), OneDrivePathHandler(), Detectron2Handler()):
    PathManager.register_handler(_handler)
