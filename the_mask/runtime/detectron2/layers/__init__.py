"""Layers: convolution with norm and activation, norms, block base class, shapes."""

from .._missing import not_provided
from .batch_norm import FrozenBatchNorm2d, NaiveSyncBatchNorm, get_norm
from .blocks import CNNBlockBase
from .shape_spec import ShapeSpec
from .wrappers import BatchNorm2d, Conv2d, ConvTranspose2d, Linear, cat, interpolate

__all__ = [
    "BatchNorm2d",
    "CNNBlockBase",
    "Conv2d",
    "ConvTranspose2d",
    "FrozenBatchNorm2d",
    "Linear",
    "NaiveSyncBatchNorm",
    "ShapeSpec",
    "cat",
    "get_norm",
    "interpolate",
]

__getattr__ = not_provided(__name__)
