"""Predictions as COCO JSON: run-length codes or panoptic, one file per video, and YouTube-VIS, one file for all."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from the_mask.data.classes import ClassList
from the_mask.data.exporters.common import Exporter, JsonList, LabelFrame, Region, write_document
from the_mask.data.files import inside
from the_mask.data.io import write_picture


class CocoExporter(Exporter):
    """``<video>.json``: COCO instances, a compressed run-length code for every class in every frame."""

    def begin(self, video: str) -> None:
        self._images, self._annotations = JsonList(self.folder), JsonList(self.folder)

    def add(self, frame: LabelFrame, found: list[Region]) -> None:
        self._images.add(_image(self._images.count + 1, frame))
        for region, code in zip(found, encode(found), strict=True):
            annotation = {"id": self._annotations.count + 1, "image_id": self._images.count, "iscrowd": 0}
            self._annotations.add({**annotation, **_facts(region, code), "segmentation": _text(code)})

    def end(self, video: str) -> None:
        fields = {"images": self._images, "annotations": self._annotations, "categories": categories(self.classes)}
        write_document(self.path(f"{video}.json"), {"info": _info(self.model), **fields})


class PanopticExporter(Exporter):
    """``<video>.json`` and PNGs in the folder ``<video>``: COCO panoptic, every class as one stuff segment."""

    def begin(self, video: str) -> None:
        self._images, self._annotations = JsonList(self.folder), JsonList(self.folder)

    def add(self, frame: LabelFrame, found: list[Region]) -> None:
        ids = np.zeros(frame.labels.shape, np.uint32)
        for region in found:
            ids[region.mask] = region.label + 1
        name = f"{frame.name}.png"
        # A segment's id is r + 256 g + 65536 b of its colour.
        colors = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
        write_picture(inside(self.folder, frame.video, name), colors, durable=False)
        self._images.add(_image(self._images.count + 1, frame))
        segments = [
            {"id": region.label + 1, "iscrowd": 0, **_facts(region, code)}
            for region, code in zip(found, encode(found), strict=True)
        ]
        self._annotations.add({"image_id": self._images.count, "file_name": name, "segments_info": segments})

    def end(self, video: str) -> None:
        things = [{**category, "isthing": 0} for category in categories(self.classes)]
        fields = {"images": self._images, "annotations": self._annotations, "categories": things}
        # The JSON refers to the PNGs: they must be on the disk before it.
        os.sync()
        write_document(self.path(f"{video}.json"), {"info": _info(self.model), **fields})


class YtvisExporter(Exporter):
    """``annotations.json``: YouTube-VIS, one object per class and video with a run-length code for every frame."""

    def begin(self, video: str) -> None:
        if self.report.videos == 1:
            self._videos_list, self._objects = JsonList(self.folder), JsonList(self.folder)
        self._pictures: list[str] = []
        self._codes: dict[int, dict[int, Any]] = {}

    def add(self, frame: LabelFrame, found: list[Region]) -> None:
        self.require_one_size(frame)
        for region, code in zip(found, encode(found), strict=True):
            self._codes.setdefault(region.label, {})[len(self._pictures)] = code
        self._pictures.append(frame.picture)

    def end(self, video: str) -> None:
        height, width = self._size
        number, length = self._videos_list.count + 1, len(self._pictures)
        entry = {"id": number, "name": video, "height": height, "width": width, "length": length}
        self._videos_list.add({**entry, "file_names": self._pictures})
        for label, codes in sorted(self._codes.items()):
            by_frame = [codes.get(t) for t in range(length)]
            self._objects.add(
                {
                    "id": self._objects.count + 1,
                    "video_id": number,
                    "category_id": label + 1,
                    "iscrowd": 0,
                    "height": height,
                    "width": width,
                    "length": length,
                    "segmentations": [None if code is None else _text(code) for code in by_frame],
                    "bboxes": [None if code is None else coco_mask.toBbox(code).tolist() for code in by_frame],
                    "areas": [None if code is None else int(coco_mask.area(code)) for code in by_frame],
                }
            )

    def finish(self) -> None:
        fields = {"videos": self._videos_list, "annotations": self._objects, "categories": categories(self.classes)}
        write_document(self.path("annotations.json"), {"info": _info(self.model), **fields})


def encode(found: list[Region]) -> list[Any]:
    """COCO's compressed run-length codes of some regions."""
    if not found:
        return []
    masks = np.stack([region.mask for region in found]).astype(np.uint8)
    # pycocotools takes [H, W, N] in column order.
    return list(coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0))))


def categories(classes: ClassList) -> list[dict[str, Any]]:
    """The categories of a class list; ids count from 1, because 0 is "no class" in these formats."""
    return [
        {"id": i + 1, "name": name, "supercategory": "", "color": list(color)}
        for i, (name, color) in enumerate(zip(classes.names, classes.colors, strict=True))
    ]


def _text(code: Any) -> dict[str, Any]:
    return {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}


def _facts(region: Region, code: Any) -> dict[str, Any]:
    box = [int(value) for value in coco_mask.toBbox(code)]
    return {"category_id": region.label + 1, "area": int(coco_mask.area(code)), "bbox": box}


def _image(number: int, frame: LabelFrame) -> dict[str, Any]:
    height, width = frame.labels.shape
    return {"id": number, "file_name": frame.picture, "height": height, "width": width}


def _info(model: str) -> dict[str, str]:
    return {"description": f"predictions of {model}" if model else "predictions"}
