"""Keys of keyframe propagation: key segmentor, propagator, policy, training."""

from __future__ import annotations

from detectron2.config import CfgNode

from the_mask.config.allowed import one_of

VARIANTS = ("paper", "official", "agnostic")
CARRIED = ("classes", "queries")


def add_keys(cfg: CfgNode) -> None:
    """Add them to ``cfg``, in place."""
    # Of META_ARCHITECTURE PropagatedSegmentor. The other keys of the config describe the key segmentor.
    cfg.MODEL.KEYFRAME = CfgNode()
    # Meta-architecture that segments keyframes; it stays frozen.
    cfg.MODEL.KEYFRAME.SEGMENTOR = "ClipSegmentor"
    # What happens between keyframes: "copy", "warp" or "gsvnet".
    cfg.MODEL.KEYFRAME.PROPAGATOR = "gsvnet"
    # gsvnet: "paper", "official" (layers of the released checkpoints) or "agnostic" (filters masks of queries too).
    cfg.MODEL.KEYFRAME.VARIANT = one_of(*VARIANTS)
    # gsvnet: use features of the present frame; False is the ablation of the paper's Table 4.
    cfg.MODEL.KEYFRAME.INTRA = True
    # gsvnet: 1 filters over the 8 neighbours, a larger one over 8 more points at this distance (cells).
    cfg.MODEL.KEYFRAME.REACH = 1
    # Norm of the propagator's networks.
    cfg.MODEL.KEYFRAME.NORM = "BN"
    # What is carried from frame to frame: "classes" (log-probabilities), or "queries" (mask logits of a segmentor that
    # has queries, so that masks of its objects move too).
    cfg.MODEL.KEYFRAME.CARRY = one_of(*CARRIED)
    # Pixels per cell of the carried maps.
    cfg.MODEL.KEYFRAME.STRIDE = 8
    # Keyframes are segmented at this scale (GSVNet: 0.75).
    cfg.MODEL.KEYFRAME.KEY_SCALE = 1.0
    # Compute what the released GSVNet computes, for its weights: raw logits of the segmentor are carried, all resizing
    # puts corner cells on corner pixels, frames are BGR, VARIANT is "official".
    cfg.MODEL.KEYFRAME.RELEASED = False
    # Frames as the propagator sees them; empty lists take MODEL.PIXEL_MEAN and PIXEL_STD. Statistics are in RGB order.
    cfg.MODEL.KEYFRAME.PIXEL_MEAN = []
    cfg.MODEL.KEYFRAME.PIXEL_STD = []

    # When a frame becomes a keyframe: "interval", "scene_cut", "warp_error", "intra_weight" or "disagreement".
    cfg.MODEL.KEYFRAME.POLICY = "interval"
    # interval: frames from one keyframe to the next.
    cfg.MODEL.KEYFRAME.INTERVAL = 4
    # Others: the measure that asks for a keyframe; None takes the policy's own default.
    cfg.MODEL.KEYFRAME.THRESHOLD = None
    # Hysteresis: once it has asked, the measure must fall below this share of THRESHOLD before it can ask again; 0 lets
    # it ask always.
    cfg.MODEL.KEYFRAME.REARM = 0.0
    # Fewest and most frames from one keyframe to the next; 0 sets no upper limit.
    cfg.MODEL.KEYFRAME.MIN_GAP = 1
    cfg.MODEL.KEYFRAME.MAX_GAP = 0

    # Training: distances (frames) from keyframe to labelled frame, one drawn per batch.
    cfg.MODEL.KEYFRAME.DISTANCES = [1, 2, 3, 4]
    # Last steps of a clip that are differentiated (GSVNet: 2); 0 takes all.
    cfg.MODEL.KEYFRAME.UNROLL = 2
    # Weights of cross-entropy and of KL(segmentor || student) on the last frame (released code: 10 and 100).
    cfg.MODEL.KEYFRAME.LOSS_WEIGHT = 1.0
    cfg.MODEL.KEYFRAME.DISTILL_WEIGHT = 0.0
    # Weight of each class in the cross-entropy; [] weighs all alike.
    cfg.MODEL.KEYFRAME.CLASS_WEIGHTS = []
    # Folder where the frozen segmentor's scores are kept between epochs; needs training without augmentation.
    cfg.MODEL.KEYFRAME.CACHE_DIR = ""

    # Evaluate every labelled frame at each distance 0 ... KEYFRAME_DISTANCES - 1 from a keyframe; 0 does not.
    cfg.TEST.KEYFRAME_DISTANCES = 0
