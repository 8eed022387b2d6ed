"""Keys of keyframe propagation: key segmentor, propagator, policy, training."""

from __future__ import annotations

from the_mask.config.options import Options, one_of, option, within

VARIANTS = ("paper", "official", "agnostic")
CARRIED = ("classes", "queries")


class KeyframeOptions(Options, group="MODEL.KEYFRAME"):
    """Of META_ARCHITECTURE PropagatedSegmentor. The other keys of the config describe the key segmentor."""

    # Meta-architecture that segments keyframes; it stays frozen.
    segmentor: str = "ClipSegmentor"
    # What happens between keyframes: "copy", "warp" or "gsvnet".
    propagator: str = "gsvnet"
    # gsvnet: "paper", "official" (layers of the released checkpoints) or "agnostic" (filters masks of queries too).
    variant: str = one_of(*VARIANTS)
    # gsvnet: use features of the present frame; False is the ablation of the paper's Table 4.
    intra: bool = True
    # gsvnet: 1 filters over the 8 neighbours, a larger one over 8 more points at this distance (cells).
    reach: int = 1
    # Norm of the propagator's networks.
    norm: str = "BN"
    # What is carried from frame to frame: "classes" (log-probabilities), or "queries" (mask logits of a segmentor that
    # has queries, so that masks of its objects move too).
    carry: str = one_of(*CARRIED)
    # Pixels per cell of the carried maps.
    stride: int = within(8, least=1)
    # Keyframes are segmented at this scale (GSVNet: 0.75).
    key_scale: float = 1.0
    # Compute what the released GSVNet computes, for its weights: raw logits of the segmentor are carried, all resizing
    # puts corner cells on corner pixels, frames are BGR, VARIANT is "official".
    released: bool = False
    # When a frame becomes a keyframe: "interval", "scene_cut", "warp_error", "intra_weight" or "disagreement".
    policy: str = "interval"
    # interval: frames from one keyframe to the next.
    interval: int = 4
    # Others: the measure that asks for a keyframe; None takes the policy's own default.
    threshold: float | None = None
    # Hysteresis: once it has asked, the measure must fall below this share of THRESHOLD before it can ask again; 0 lets
    # it ask always.
    rearm: float = 0.0
    # Fewest and most frames from one keyframe to the next; 0 sets no upper limit.
    min_gap: int = 1
    max_gap: int = 0
    # Training: distances (frames) from keyframe to labelled frame, one drawn per batch.
    distances: tuple[int, ...] = (1, 2, 3, 4)
    # Last steps of a clip that are differentiated (GSVNet: 2); 0 takes all.
    unroll: int = within(2, least=0)
    # Weights of cross-entropy and of KL(segmentor || student) on the last frame (released code: 10 and 100).
    loss_weight: float = 1.0
    distill_weight: float = 0.0
    # Weight of each class in the cross-entropy; [] weighs all alike.
    class_weights: tuple[float, ...] = ()
    # Folder where the frozen segmentor's scores are kept between epochs; needs training without augmentation.
    cache_dir: str = ""
    # Evaluate every labelled frame at each distance 0 ... KEYFRAME_DISTANCES - 1 from a keyframe; 0 does not.
    evaluated_distances: int = option(0, key="TEST.KEYFRAME_DISTANCES")

    def check(self) -> None:
        if not 0 < self.key_scale <= 2:
            raise ValueError(f"MODEL.KEYFRAME.KEY_SCALE is {self.key_scale}; expected above 0 and at most 2")
        if not self.distances or min(self.distances) < 1:
            raise ValueError(
                f"MODEL.KEYFRAME.DISTANCES {list(self.distances)}: expected whole numbers of frames >= 1, at least one"
            )
