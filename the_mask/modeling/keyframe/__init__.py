"""Keyframe propagation: light key segmentors, propagators between keyframes, and the policies that choose them."""

from the_mask.modeling.keyframe.bisenet import BiSeNetHead, build_bisenet_r18_backbone
from the_mask.modeling.keyframe.build import PROPAGATORS, build_propagator
from the_mask.modeling.keyframe.policies import KEYFRAME_POLICIES, build_policy
from the_mask.modeling.keyframe.propagators import CopyPropagator, GSVNet, Propagated, Propagator, WarpPropagator
from the_mask.modeling.keyframe.resnet18 import build_swiftnet_r18_backbone
from the_mask.modeling.keyframe.swiftnet import SwiftNetHead

__all__ = [
    "KEYFRAME_POLICIES",
    "PROPAGATORS",
    "BiSeNetHead",
    "CopyPropagator",
    "GSVNet",
    "Propagated",
    "Propagator",
    "SwiftNetHead",
    "WarpPropagator",
    "build_bisenet_r18_backbone",
    "build_policy",
    "build_propagator",
    "build_swiftnet_r18_backbone",
]
