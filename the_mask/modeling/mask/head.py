"""The mask-classification head: pixel decoder and mask decoder under the names of the official checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from the_mask.modeling.mask.mask_decoders import build_mask_decoder
from the_mask.modeling.mask.mask_decoders.base import Predictions
from the_mask.modeling.mask.pixel_decoders import PixelDecoder, build_pixel_decoder


@SEM_SEG_HEADS_REGISTRY.register()
class MaskClassificationHead(nn.Module):
    """``pixel_decoder``, then ``predictor``; streams call them separately (see ``MaskClassifier.step``)."""

    @configurable
    def __init__(self, *, pixel_decoder: PixelDecoder, predictor: nn.Module) -> None:
        super().__init__()
        self.pixel_decoder: PixelDecoder = pixel_decoder
        self.predictor = predictor

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        pixel_decoder = build_pixel_decoder(cfg, input_shape)
        return {"pixel_decoder": pixel_decoder, "predictor": build_mask_decoder(cfg, pixel_decoder.out_channels)}

    def forward(self, features: Mapping[str, Tensor], num_frames: int = 1, aux: bool = False) -> Predictions:
        """Predict for backbone maps [B*T, C_f, h_f, w_f]; see :mod:`the_mask.modeling.mask.mask_decoders.base`."""
        mask_features, maps = self.pixel_decoder(features)
        return self.predictor(maps, mask_features, num_frames, aux)
