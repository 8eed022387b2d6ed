"""Features of a frozen backbone, computed once per frame and kept on disk (``MODEL.FROZEN_FEATURES``).

A file holds the features of one network input in float16. Its name is a digest of the input's pixels, so equal pixels
share their features however they were prepared (resizing, flips, padding). The folder's name is a digest of the
backbone: weights, buffers and class. Files are complete or absent, so an interrupted run continues where it stopped.

Axes: N images, H W size of the network input.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from the_mask.data.files import atomic_write, read_json, write_json
from the_mask.modeling.digest import weights_digest

logger = logging.getLogger(__name__)

MANIFEST = "features.json"
SUFFIX = ".safetensors"


def backbone_digest(backbone: nn.Module) -> str:
    """Hexadecimal digest of a backbone's class, weights and buffers."""
    return weights_digest(backbone, type(backbone).__name__)


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class FeatureCache:
    """Reads and writes the features of one frozen backbone.

    Args:
        folder: folder of all caches; this backbone's is a sub-folder.
        max_bytes: when the cache is larger, nothing more is written; existing features are still read.

    Attributes:
        hits, misses: numbers of images read and computed since the start.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.root = Path(folder)
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._folder: Path | None = None
        self._size = 0

    def open(self, backbone: nn.Module) -> Path:
        """The folder of a backbone; created if needed.

        Raises:
            ValueError: the folder holds features of another backbone, or cannot be written.
        """
        digest = backbone_digest(backbone)
        folder = self.root / f"{type(backbone).__name__}-{digest[:16]}"
        manifest = folder / MANIFEST
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not manifest.is_file():
                content = {"backbone": type(backbone).__name__, "digest": digest, "dtype": "float16"}
                write_json(manifest, content)
            found = read_json(manifest)
        except ValueError as error:
            raise ValueError(f"{error}; delete its folder, it will be made anew") from error
        except OSError as error:
            raise ValueError(f"MODEL.FROZEN_FEATURES.CACHE {self.root}: {error}") from error
        if found.get("digest") != digest:
            raise ValueError(
                f"{folder} holds features of other weights ({str(found.get('digest'))[:16]}, not {digest[:16]}): "
                "delete it, or use another MODEL.FROZEN_FEATURES.CACHE"
            )
        self._size = sum(path.stat().st_size for path in folder.glob(f"*{SUFFIX}"))
        if self._size > self.max_bytes:
            logger.warning("%s is full (%d bytes): new features are not kept", folder, self._size)
        self._folder = folder
        return folder

    def features(
        self, backbone: nn.Module, compute: Callable[[Tensor], dict[str, Tensor]], images: Tensor
    ) -> dict[str, Tensor]:
        """Features of images [N, 3, H, W]: read from the cache, or computed and stored.

        Computed features are also rounded to float16, so that results do not depend on the state of the cache.
        """
        folder = self._folder or self.open(backbone)
        paths = [folder / f"{hashlib.blake2b(_bytes(image), digest_size=20).hexdigest()}{SUFFIX}" for image in images]
        known = {path: self._read(path) for path in dict.fromkeys(paths)}
        missing = [i for i, path in enumerate(paths) if known[path] is None]
        missing = list({paths[i]: i for i in missing}.values())
        if missing:
            fresh = compute(images[missing])
            for row, i in enumerate(missing):
                own = {name: value[row].to("cpu", torch.float16).contiguous() for name, value in fresh.items()}
                known[paths[i]] = own
                self._write(paths[i], own)
        self.hits += len(images) - len(missing)
        self.misses += len(missing)
        rows: list[dict[str, Tensor]] = [known[path] or {} for path in paths]
        for path, found in zip(paths, rows, strict=True):
            if {name: x.shape for name, x in found.items()} != {name: x.shape for name, x in rows[0].items()}:
                raise ValueError(f"{path} has other features than {paths[0]}; delete both, they will be computed again")
        return {name: torch.stack([row[name] for row in rows]).to(images.device, images.dtype) for name in rows[0]}

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        if not path.is_file():
            return None
        try:
            found = load_file(str(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is broken ({error}); delete it, it will be computed again") from error
        # Safetensors sorts names, so the level's number is put in front.
        levels = {number: (name, value) for key, value in found.items() for number, _, name in [key.partition(" ")]}
        if not found or levels.keys() != {str(number) for number in range(len(found))}:
            names = ", ".join(found)[:200]
            raise ValueError(f"{path} is broken (its levels: {names}); delete it, it will be computed again")
        return dict(levels[str(number)] for number in range(len(found)))

    def _write(self, path: Path, features: dict[str, Tensor]) -> None:
        if self._size > self.max_bytes:
            return
        content = save({f"{number} {name}": value for number, (name, value) in enumerate(features.items())})
        if self._size + len(content) > self.max_bytes:
            logger.warning(
                "%s has reached MODEL.FROZEN_FEATURES.MAX_GB: features of further frames are computed each time",
                path.parent,
            )
            self._size = self.max_bytes + 1
            return
        try:
            atomic_write(path, content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                f"no space left for {path}: the cache holds {self._size / 2**30:.2f} GiB; free the disk, set "
                "MODEL.FROZEN_FEATURES.MAX_GB to what it may take, or CACHE to a folder on another disk"
            ) from error
        self._size += len(content)


def attach_cache(model: Any, cfg: CfgNode) -> None:
    """Let a segmentor's frozen backbone read and write the cache of ``MODEL.FROZEN_FEATURES`` while it trains.

    Evaluation and streams compute their features in full precision, as they do without a cache.

    Raises:
        ValueError: the backbone trains, or training frames are augmented at random.
    """
    options = cfg.MODEL.FROZEN_FEATURES
    if not options.CACHE:
        return
    backbone = getattr(model, "backbone", None)
    if backbone is None or any(parameter.requires_grad for parameter in backbone.parameters()):
        raise ValueError(
            "MODEL.FROZEN_FEATURES.CACHE needs a backbone that does not train at all: set MODEL.THE_MASK.TRAINABLE "
            '["sem_seg_head"], or MODEL.BACKBONE.FREEZE_AT'
        )
    if not cfg.MODEL.THE_MASK.FROZEN_EVAL:
        raise ValueError("MODEL.FROZEN_FEATURES.CACHE needs MODEL.THE_MASK.FROZEN_EVAL True, a backbone in eval mode")
    problems = list(random_augmentation(cfg))
    if problems:
        raise ValueError(
            f"MODEL.FROZEN_FEATURES.CACHE: training frames are never the same twice ({', '.join(problems)}), so no "
            "feature would be read again"
        )
    cache = FeatureCache(options.CACHE, int(options.MAX_GB * 2**30))
    compute = backbone.forward

    def forward(self: nn.Module, images: Tensor) -> dict[str, Tensor]:
        if not model.training:
            return compute(images)
        # The precision of the features is that of the cache, whatever the rest of the model uses.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return cache.features(self, compute, images)

    backbone.forward = types.MethodType(forward, backbone)
    model.feature_cache = cache


def random_augmentation(cfg: CfgNode) -> list[str]:
    """Config keys that make training frames differ every time. Mirroring is allowed: it only doubles the cache."""
    resize, crop = cfg.INPUT.RESIZE, cfg.INPUT.CROP
    problems = []
    if resize.MIN_SCALE != resize.MAX_SCALE:
        problems.append(f"INPUT.RESIZE.MIN_SCALE {resize.MIN_SCALE} and MAX_SCALE {resize.MAX_SCALE}: set both to 1.0")
    if crop.ENABLED:
        problems.append("INPUT.CROP.ENABLED True: set it to False")
    if cfg.INPUT.COLOR_JITTER != "none":
        problems.append(f"INPUT.COLOR_JITTER {cfg.INPUT.COLOR_JITTER!r}: set it to none")
    return problems
