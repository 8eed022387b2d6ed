"""Class-agnostic masks of a frame for voting: from files, from Segment Anything, or from superpixels.

Masks are COCO run lengths: dicts with ``size`` [H, W] and compressed ``counts`` (see pycocotools).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from detectron2.config import CfgNode
from numpy.typing import NDArray
from pycocotools import mask as coco

from the_mask.data.files import inside, parse_json, read_text, write_inside
from the_mask.data.importers.common import checked_runs
from the_mask.data.schema import Each, check_schema
from the_mask.inference.superpixels import slic
from the_mask.modeling.stream import FrameName

RunLengths = dict[str, Any]
PROVIDERS = ("", "files", "sam", "sam2", "superpixels")
# Settings of the released SSA: 64 x 64 points, one layer of crops with half of them.
SAM_SETTINGS: dict[str, Any] = {
    "points_per_side": 64,
    "pred_iou_thresh": 0.86,
    "stability_score_thresh": 0.92,
    "crop_n_layers": 1,
    "crop_n_points_downscale_factor": 2,
    "min_mask_region_area": 100,
    "output_mode": "coco_rle",
}


class MaskGenerator(Protocol):
    """Makes masks for voting."""

    def masks(self, image: NDArray[np.uint8], name: FrameName | None) -> list[RunLengths]:
        """Masks of a frame, uint8 RGB [H, W, 3], named (video, frame); they may overlap, and there may be none."""
        ...


class StoredMasks:
    """Masks from ``<folder>/<video>/<frame>.json``: a list of run lengths, or of SAM's records with ``segmentation``.

    Raises:
        FileNotFoundError: no such folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"folder of masks {self.folder} does not exist (TEST.VOTING.FOLDER)")

    def masks(self, image: NDArray[np.uint8], name: FrameName | None) -> list[RunLengths]:
        """Masks of the frame's file.

        Raises:
            FileNotFoundError: no file for this frame. ValueError: no name, or a file of another form.
        """
        if name is None:
            raise ValueError(f"stored masks ({self.folder}) are found by video and frame, but the frame has no name")
        path = mask_path(self.folder, name)
        if not path.is_file():
            raise FileNotFoundError(f"mask file {path} is missing (video {name[0]}, frame {name[1]})")
        content = parse_json(read_text(path, "mask file"), f"mask file {path}")
        check_schema(content, Each(list, dict), f"mask file {path} is no list of COCO run lengths")
        return [_stored(record, image.shape[:2], f"mask file {path}") for record in content]


class SuperpixelMasks:
    """Superpixels (SLIC) as masks: no weights needed, borders follow colour edges.

    Args:
        segments, compactness: see :func:`the_mask.inference.superpixels.slic`.
    """

    def __init__(self, segments: int = 300, compactness: float = 10.0) -> None:
        self.segments = segments
        self.compactness = compactness

    def masks(self, image: NDArray[np.uint8], name: FrameName | None) -> list[RunLengths]:
        """One mask per superpixel; together they cover the frame."""
        # In column order, as run lengths are, so that masks need not be copied.
        regions = np.asfortranarray(slic(image, self.segments, self.compactness))
        return [encode(regions == region) for region in range(int(regions.max()) + 1)]


class SamMasks:
    """Automatic masks of Segment Anything 1 or 2, with the settings of SSA.

    Args:
        version: "sam" (package segment-anything) or "sam2".
        weights: its checkpoint.
        model: "vit_h", "vit_l", "vit_b" for SAM; name of a config file of SAM 2.
        device: where it runs.

    Raises:
        ImportError: the package is not installed. FileNotFoundError: no weights.
    """

    def __init__(self, version: str, weights: str | Path, model: str, device: str = "cpu") -> None:
        if not Path(weights).is_file():
            raise FileNotFoundError(f"weights of {version} {str(weights)!r} do not exist (TEST.VOTING.WEIGHTS)")
        if version == "sam":
            package = _optional("segment_anything", "segment-anything")
            network = package.sam_model_registry[model](checkpoint=str(weights)).to(device)
            self._generator = package.SamAutomaticMaskGenerator(network, **SAM_SETTINGS)
        else:
            network = _optional("sam2.build_sam", "sam2").build_sam2(model, str(weights), device=device)
            generators = _optional("sam2.automatic_mask_generator", "sam2")
            self._generator = generators.SAM2AutomaticMaskGenerator(network, **SAM_SETTINGS)

    def masks(self, image: NDArray[np.uint8], name: FrameName | None) -> list[RunLengths]:
        """SAM's masks, in its order."""
        return [_compressed(record) for record in self._generator.generate(image)]


class SavingMasks:
    """Wraps a generator and also writes its masks to a folder for :class:`StoredMasks`."""

    def __init__(self, generator: MaskGenerator, folder: str | Path) -> None:
        self.generator = generator
        self.folder = Path(folder)

    def masks(self, image: NDArray[np.uint8], name: FrameName | None) -> list[RunLengths]:
        """The generator's masks."""
        if name is None:
            raise ValueError("TEST.VOTING.SAVE_MASKS names files after video and frame, but the frame has no name")
        found = self.generator.masks(image, name)
        save_masks(self.folder, name, found)
        return found


def build_mask_generator(cfg: CfgNode) -> MaskGenerator:
    """The generator of ``TEST.VOTING``.

    Raises:
        ValueError: unknown ``MASKS``, or an error of the generator.
    """
    node = cfg.TEST.VOTING
    if node.MASKS == "files":
        return StoredMasks(node.FOLDER)
    if node.MASKS == "superpixels":
        generator: MaskGenerator = SuperpixelMasks(node.SEGMENTS, node.COMPACTNESS)
    elif node.MASKS in ("sam", "sam2"):
        generator = SamMasks(node.MASKS, node.WEIGHTS, node.MODEL, cfg.MODEL.DEVICE)
    else:
        raise ValueError(f"TEST.VOTING.MASKS {node.MASKS!r}: expected one of {', '.join(map(repr, PROVIDERS))}")
    return SavingMasks(generator, node.SAVE_MASKS) if node.SAVE_MASKS else generator


def mask_path(folder: Path, name: FrameName) -> Path:
    """File of one frame, (video, frame)."""
    return inside(folder, name[0], f"{name[1]}.json")


def save_masks(folder: Path, name: FrameName, masks: Sequence[Mapping[str, Any]]) -> None:
    """Write the run lengths of a frame, (video, frame), as JSON, atomically."""
    records = [{"size": list(mask["size"]), "counts": _text(mask["counts"])} for mask in masks]
    write_inside(folder, name[0], f"{name[1]}.json", content=json.dumps(records).encode())


def encode(mask: NDArray[np.bool_]) -> RunLengths:
    """Compressed run lengths of a mask [H, W]."""
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))


def _stored(record: Mapping[str, Any], size: tuple[int, ...], where: str) -> RunLengths:
    """Compressed run lengths of a record of a file, after it was checked."""
    found = record.get("segmentation", record)
    check_schema(found, dict, f"{where} is no list of COCO run lengths")
    checked_runs(found, (size[0], size[1]), where)
    return _compressed(found)


def _compressed(record: Mapping[str, Any]) -> RunLengths:
    """Compressed run lengths of a record, whose counts may be a list, text or bytes."""
    found = record.get("segmentation", record)
    height, width = found["size"]
    if isinstance(found["counts"], list):
        return coco.frPyObjects({"size": [height, width], "counts": found["counts"]}, height, width)
    counts = found["counts"]
    return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}


def _text(counts: bytes | str) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts


def _optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"TEST.VOTING.MASKS needs the package {package}: pip install {package}, or take masks from files or "
            "superpixels"
        ) from error
