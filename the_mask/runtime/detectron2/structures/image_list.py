"""Images of different sizes in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class ImageList:
    """A padded batch ``tensor`` [N,...,H,W] and the (height, width) of each image before padding, ``image_sizes``."""

    def __init__(self, tensor: Tensor, image_sizes: list[tuple[int, int]]) -> None:
        self.tensor = tensor
        self.image_sizes = image_sizes

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __getitem__(self, idx: int) -> Tensor:
        """Return image ``idx`` without its padding."""
        height, width = self.image_sizes[idx]
        return self.tensor[idx, ..., :height, :width]

    def to(self, *args: Any, **kwargs: Any) -> ImageList:
        """Return the same images on another device or in another dtype."""
        return ImageList(self.tensor.to(*args, **kwargs), self.image_sizes)

    @property
    def device(self) -> torch.device:
        """Where the batch is."""
        return self.tensor.device

    @staticmethod
    def from_tensors(
        tensors: Sequence[Tensor],
        size_divisibility: int = 0,
        pad_value: float = 0.0,
        padding_constraints: dict[str, int] | None = None,
    ) -> ImageList:
        """Pad images at the bottom and right to one size.

        Args:
            tensors: images [...,H_i,W_i] with equal leading axes.
            size_divisibility: both sides become multiples of it, if above 1.
            pad_value: value of padding pixels.
            padding_constraints: ``Backbone.padding_constraints``; its ``size_divisibility`` replaces the argument, and
                ``square_size``, if above 0, is the side of a square that all images fit into.
        """
        assert len(tensors) > 0
        assert isinstance(tensors, (tuple, list))
        for image in tensors:
            assert isinstance(image, Tensor), type(image)
            assert image.shape[:-2] == tensors[0].shape[:-2], image.shape
        sizes = [(image.shape[-2], image.shape[-1]) for image in tensors]
        height = max(size[0] for size in sizes)
        width = max(size[1] for size in sizes)
        constraints = padding_constraints or {}
        square = constraints.get("square_size", 0)
        if square > 0:
            height = width = square
        step = constraints.get("size_divisibility", size_divisibility)
        if step > 1:
            height = -(-height // step) * step
            width = -(-width // step) * step
        if len(tensors) == 1:
            # Without the extra copy of a new batch.
            padding = [0, width - sizes[0][1], 0, height - sizes[0][0]]
            return ImageList(F.pad(tensors[0], padding, value=pad_value).unsqueeze(0).contiguous(), sizes)
        batch = tensors[0].new_full((len(tensors), *tensors[0].shape[:-2], height, width), pad_value)
        for image, target in zip(tensors, batch, strict=True):
            target[..., : image.shape[-2], : image.shape[-1]].copy_(image)
        return ImageList(batch, sizes)
