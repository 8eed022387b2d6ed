"""Sources of a frame's class prior. ``ClipSegmentor`` asks its provider for it, and passes on each prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import Tensor

from the_mask.modeling.pixel.context.types import PriorMap, TrainBatch

if TYPE_CHECKING:
    from the_mask.modeling.pixel.clip_segmentor import ClipSegmentor

PRIOR_PROVIDERS = Registry("PRIOR_PROVIDERS")
PRIOR_PROVIDERS.__doc__ = "Functions ``(cfg) -> PriorProvider``, by the value of ``MODEL.CONTEXT.PRIOR``."


class PriorProvider:
    """Gives no prior. Used by models without a class memory, and the base class of the other providers.

    Attributes:
        past_frames: frames before the current one that :meth:`for_training` needs beyond the head's memory.
    """

    past_frames = 0

    def for_training(self, model: ClipSegmentor, batch: TrainBatch) -> PriorMap | None:
        """Prior of the current frames of a training batch, at image size or any other."""
        return None

    def for_frame(self, kept: dict[str, Any]) -> PriorMap | None:
        """Prior of the next frame of a stream, from the result of :meth:`after_frame`."""
        return None

    def after_frame(self, kept: dict[str, Any], scores: Tensor) -> dict[str, Any]:
        """The state of a stream ({} before its first frame) after a frame with probabilities [B, K, h, w].

        Plain tensors and numbers only; ``kept`` is not changed.
        """
        return kept


def prior_provider(name: str) -> Callable[[Callable[[CfgNode], PriorProvider]], Callable[[CfgNode], PriorProvider]]:
    """Decorator that registers a builder under a value of ``MODEL.CONTEXT.PRIOR``."""

    def register(builder: Callable[[CfgNode], PriorProvider]) -> Callable[[CfgNode], PriorProvider]:
        builder.__name__ = name
        PRIOR_PROVIDERS.register(builder)
        return builder

    return register


@prior_provider("none")
def _none(cfg: CfgNode) -> PriorProvider:
    return PriorProvider()


def build_prior_provider(cfg: CfgNode) -> PriorProvider:
    """The provider named by ``MODEL.CONTEXT.PRIOR``.

    Raises:
        ValueError: unknown name.
    """
    name = cfg.MODEL.CONTEXT.PRIOR
    if name not in PRIOR_PROVIDERS:
        known = ", ".join(sorted(key for key, _ in PRIOR_PROVIDERS))
        raise ValueError(f"MODEL.CONTEXT.PRIOR {name!r}: expected one of {known}")
    return PRIOR_PROVIDERS.get(name)(cfg)
