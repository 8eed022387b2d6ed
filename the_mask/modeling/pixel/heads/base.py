"""The protocol of per-pixel heads. Axes: B clips, K classes, C channels, h w feature size."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from the_mask.config.keys.context import PixelHeadOptions
from the_mask.modeling.pixel.context.types import ClipFeatures, FrameFeatures, HeadOutput, PriorMap
from the_mask.modeling.pixel.layers import classifier


class PixelHead(nn.Module):
    """Maps backbone features of a frame and of the frames before it, and a prior, to class logits.

    Attributes:
        stride: input pixels per cell of the logits.
        memory_length: T, memory frames the head reads; 0 for image heads.
        memory_levels: backbone levels it reads of them.
    """

    stride: int
    memory_length: int = 0
    memory_levels: tuple[str, ...] = ()

    def add_classifier(self, options: PixelHeadOptions, channels: int = 0) -> None:
        """Dropout of whole channels, and a classifier of features of ``channels`` (0: ``convs_dim``)."""
        self.dropout = nn.Dropout2d(options.dropout)
        self.conv_seg = classifier(channels or options.convs_dim, options.num_classes)

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, K, h, w] of features [B, C, h, w]."""
        return self.conv_seg(self.dropout(features))

    @property
    def uses_prior(self) -> bool:
        """Whether the head reads a prior."""
        return False

    def stateful_blocks(self) -> Iterable[nn.Module]:
        """Modules with ``after_loss(batch, iteration)`` and ``after_step()``, called while training."""
        return ()

    def extra_losses(self, iteration: int) -> dict[str, Tensor]:
        """Additional weighted training losses by name."""
        return {}

    @abstractmethod
    def forward(
        self, features: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> HeadOutput:
        """Logits of the current frame.

        Args:
            features: backbone levels [B, C, h, w] of the current frame.
            memory: ``memory_length`` frames of ``memory_levels``; None for image heads.
            prior: of the current frame; None where there is none.
        """
        raise NotImplementedError

    def __call__(
        self, features: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> HeadOutput:
        return super().__call__(features, memory, prior)


def require_levels(key: str, wanted: Sequence[str], input_shape: Mapping[str, ShapeSpec]) -> list[ShapeSpec]:
    """Shapes of the backbone levels named by a config key.

    Raises:
        ValueError: no level, or one that the backbone does not have.
    """
    missing = [name for name in wanted if name not in input_shape]
    if missing or not wanted:
        raise ValueError(f"{key} {list(wanted)}: the backbone has {', '.join(input_shape)}")
    return [input_shape[name] for name in wanted]


def level_channels(shape: ShapeSpec) -> int:
    """Channels of a backbone level."""
    assert shape.channels is not None
    return shape.channels


def level_stride(shape: ShapeSpec) -> int:
    """Stride of a backbone level in pixels."""
    assert shape.stride is not None
    return shape.stride
