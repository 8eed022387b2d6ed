"""The form in which scores are carried from frame to frame: log-probabilities on a grid of the frame.

Axes: K classes, H W pixels of a frame, h' w' cells of the segmentor's scores, h w cells of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from the_mask.modeling.propagation import geometry

LEAST_LOG_PROBABILITY = -10.0


def log_probabilities(probabilities: Tensor) -> Tensor:
    """Logarithm of probabilities, not below -10, float32."""
    return probabilities.float().clamp(min=1e-30).log().clamp(min=LEAST_LOG_PROBABILITY)


@dataclass(frozen=True)
class CarriedGrid:
    """Between frames, the key segmentor's input and the grid.

    Attributes:
        stride: pixels of a frame per cell.
        source_stride: pixels of the segmentor's input per cell of its scores.
        scale: size of the segmentor's input over the frame's.
        released: the grid has its first and last cells on the first and last pixels, and carries raw logits.
    """

    stride: int
    source_stride: int
    scale: float
    released: bool

    def key_input(self, frame: Tensor) -> Tensor:
        """A frame [3, H, W] at the size that the segmentor gets."""
        if self.scale == 1:
            return frame
        size = [max(1, round(side * self.scale)) for side in frame.shape[-2:]]
        return F.interpolate(frame[None].float(), size=size, mode="bilinear", align_corners=self.released)[0]

    def scores(self, scores: Tensor, frame: Tensor) -> Tensor:
        """A segmentor's scores [K, h', w'] of a frame -> carried scores [K, h, w]."""
        if self.released:
            size = geometry.grid_size((frame.shape[-2], frame.shape[-1]), self.stride)
            return F.interpolate(scores[None], size=size, mode="bilinear", align_corners=True)[0]
        return log_probabilities(self._maps(scores / scores.sum(dim=0, keepdim=True).clamp(min=1e-9), frame))

    def masks(self, masks: Tensor, frame: Tensor) -> Tensor:
        """Mask logits [Q, h', w'] of a frame -> carried ones [Q, h, w]."""
        return self._maps(masks.clamp(LEAST_LOG_PROBABILITY, -LEAST_LOG_PROBABILITY), frame)

    def _maps(self, maps: Tensor, frame: Tensor) -> Tensor:
        size = (frame.shape[-2], frame.shape[-1])
        return geometry.to_grid(maps, size, self.stride, self.source_stride, self.scale)
