"""Base class of backbones."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod

from torch import Tensor, nn

from ...layers import ShapeSpec


class Backbone(nn.Module, metaclass=ABCMeta):
    """A network from an image [N,C,H,W] to a dict of feature maps.

    Subclasses that rely on the default ``output_shape`` set ``_out_features``, ``_out_feature_channels`` and
    ``_out_feature_strides``.
    """

    _out_features: list[str]
    _out_feature_channels: dict[str, int]
    _out_feature_strides: dict[str, int]

    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return feature maps by name."""

    @property
    def size_divisibility(self) -> int:
        """What height and width must be a multiple of; 0 if anything goes."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Further demands on padding for ``ImageList.from_tensors``: ``size_divisibility``, ``square_size``."""
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every feature map."""
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
            for name in self._out_features
        }
