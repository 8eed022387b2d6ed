"""The parts of a propagated model: its key segmentor, and the registry of propagators under the names configs use."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from fvcore.common.registry import Registry

from the_mask.modeling.propagation.propagators import CopyPropagator, GSVNet, Propagator, WarpPropagator
from the_mask.modeling.segmentor import Segmentor

PROPAGATORS = Registry("PROPAGATORS")
PROPAGATORS.__doc__ = "Functions ``name(cfg, num_classes) -> Propagator``; ``MODEL.KEYFRAME.PROPAGATOR`` chooses one."


@PROPAGATORS.register()
def copy(cfg: CfgNode, num_classes: int) -> Propagator:
    """The key frame's scores, unchanged."""
    return CopyPropagator()


@PROPAGATORS.register()
def warp(cfg: CfgNode, num_classes: int) -> Propagator:
    """Warping by the light flow network."""
    return WarpPropagator(cfg.MODEL.KEYFRAME.NORM)


@PROPAGATORS.register()
def gsvnet(cfg: CfgNode, num_classes: int) -> Propagator:
    """Warping and guided dynamic filtering."""
    options = cfg.MODEL.KEYFRAME
    variant = options.VARIANT
    if options.RELEASED:
        if variant == "agnostic":
            raise ValueError("MODEL.KEYFRAME.RELEASED is the released GSVNet, whose VARIANT is official, not agnostic")
        variant = "official"
    return GSVNet(num_classes, variant, options.INTRA, options.REACH, options.NORM)


def build_propagator(cfg: CfgNode, num_classes: int) -> Propagator:
    """The propagator of ``cfg.MODEL.KEYFRAME.PROPAGATOR``.

    Raises:
        ValueError: unknown name.
    """
    name = cfg.MODEL.KEYFRAME.PROPAGATOR
    if name not in PROPAGATORS:
        known = ", ".join(sorted(key for key, _ in PROPAGATORS))
        raise ValueError(f"MODEL.KEYFRAME.PROPAGATOR {name!r}: expected one of {known}")
    return PROPAGATORS.get(name)(cfg, num_classes)


def build_key_segmentor(cfg: CfgNode, propagated: str) -> Segmentor:
    """The segmentor of keyframes: ``MODEL.KEYFRAME.SEGMENTOR`` built from the same config.

    Args:
        cfg: of the whole model.
        propagated: name of the whole model, which cannot be its own segmentor.

    Raises:
        ValueError: unknown name.
    """
    name = cfg.MODEL.KEYFRAME.SEGMENTOR
    if name == propagated or name not in META_ARCH_REGISTRY:
        known = sorted(key for key, _ in META_ARCH_REGISTRY if key != propagated)
        raise ValueError(f"MODEL.KEYFRAME.SEGMENTOR {name!r}: expected one of {', '.join(known)}")
    own = cfg.clone()
    own.defrost()
    own.MODEL.META_ARCHITECTURE = name
    return META_ARCH_REGISTRY.get(name)(own)
