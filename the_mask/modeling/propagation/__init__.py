"""Keyframe propagation around any segmentor: propagators between keyframes, and the policies that choose them."""

from the_mask.modeling.propagation.build import PROPAGATORS, build_propagator
from the_mask.modeling.propagation.policies import KEYFRAME_POLICIES, build_policy
from the_mask.modeling.propagation.propagated import PropagatedSegmentor
from the_mask.modeling.propagation.propagators import CopyPropagator, GSVNet, Propagated, Propagator, WarpPropagator

__all__ = [
    "KEYFRAME_POLICIES",
    "PROPAGATORS",
    "CopyPropagator",
    "GSVNet",
    "Propagated",
    "PropagatedSegmentor",
    "Propagator",
    "WarpPropagator",
    "build_policy",
    "build_propagator",
]
