"""fvcore's ``Checkpointer`` with Detectron2's file formats."""

from __future__ import annotations

import logging
import pickle
from typing import Any
from urllib.parse import parse_qs, urlparse

from fvcore.common.checkpoint import Checkpointer
from torch import nn

from ..utils import comm
from ..utils.file_io import PathManager
from .align import align_and_update_state_dicts


class DetectionCheckpointer(Checkpointer):
    """Also reads ``.pkl`` files of numpy arrays and bare state dicts, and matches keys by their ends."""

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, save_to_disk: bool | None = None, **checkpointables: Any
    ):
        """Save and load ``model`` and ``checkpointables``.

        Args:
            model: may be wrapped by DDP.
            save_dir: where to save.
            save_to_disk: whether this rank saves; rank 0 by default.
            checkpointables: objects with ``state_dict`` and ``load_state_dict``, by name.
        """
        super().__init__(
            model,
            save_dir,
            save_to_disk=comm.is_main_process() if save_to_disk is None else save_to_disk,
            **checkpointables,
        )
        self.path_manager = PathManager
        self._heuristics_wanted = False

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint and return what is in it besides model and checkpointables.

        Args:
            path: file or URL; ``?matching_heuristics=True`` at its end matches keys by their ends. ``""`` does nothing.
            args: see fvcore.
            kwargs: see fvcore.
        """
        if path:
            parsed = urlparse(path)
            query = parse_qs(parsed.query)
            path = parsed._replace(query="").geturl()
            self._heuristics_wanted = query.pop("matching_heuristics", ["False"]) == ["True"]
            if query:
                raise ValueError(f"Unsupported query remaining: {query}, original filename: {parsed.geturl()}")
            path = self.path_manager.get_local_path(path)
        return super().load(path, *args, **kwargs)

    def _load_file(self, f: str) -> dict[str, Any]:
        if f.endswith(".pkl"):
            return _read_pickle(f, self.logger)
        if f.endswith(".pyth"):
            raise ValueError(f"{f}: pycls checkpoints are not provided by the embedded runtime; install Detectron2")
        checkpoint = super()._load_file(f)
        if "model" not in checkpoint:
            checkpoint = {"model": checkpoint}
        if self._heuristics_wanted:
            checkpoint["matching_heuristics"] = True
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if checkpoint.get("matching_heuristics", False):
            self._convert_ndarray_to_tensor(checkpoint["model"])
            checkpoint["model"] = align_and_update_state_dicts(self.model.state_dict(), checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        if incompatible is None:
            return None
        # Constants in the config rather than weights: their absence says nothing.
        constants = {"pixel_mean", "pixel_std"} & set(dict(self.model.named_buffers(recurse=False)))
        for key in constants & set(incompatible.missing_keys):
            incompatible.missing_keys.remove(key)
        # An anchor generator's buffers once were in checkpoints; they are made anew by the model.
        for key in [k for k in incompatible.unexpected_keys if "anchor_generator.cell_anchors" in k]:
            incompatible.unexpected_keys.remove(key)
        return incompatible


def _read_pickle(path: str, logger: logging.Logger) -> dict[str, Any]:
    with PathManager.open(path, "rb") as file:
        data = pickle.load(file, encoding="latin1")
    if "model" not in data or "__author__" not in data:
        raise ValueError(
            f"{path}: a pickle without 'model' and '__author__' holds Caffe2 weights; the conversion of their names is "
            "not provided by the embedded runtime; install Detectron2"
        )
    logger.info("Reading a file from '%s'", data["__author__"])
    return data
