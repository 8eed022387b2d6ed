"""Keys of testing and its metrics."""

from __future__ import annotations

from detectron2.config import CfgNode

from the_mask.config.allowed import within


def add_keys(cfg: CfgNode) -> None:
    """Add them to ``cfg``, in place."""
    # Clips of this many frames, CLIP_STRIDE apart, tile every test video; each frame is predicted once.
    cfg.TEST.CLIP_LENGTH = within(1, 1, 65536)
    cfg.TEST.CLIP_STRIDE = within(1, 1, 65536)
    # Clips per forward pass.
    cfg.TEST.CLIPS_PER_BATCH = within(1, 1, 65536)
    # Feed videos frame by frame through StreamingSegmentor instead of tiled clips.
    cfg.TEST.STREAMING = False
    # Window lengths of video consistency.
    cfg.TEST.VC_WINDOWS = [8, 16]
    # Weights of torchvision's RAFT for temporal consistency (TC); "" leaves TC out.
    cfg.TEST.TC_FLOW_WEIGHTS = ""
    # TC over the first this many videos (the official VSPW script: 100); 0 takes all.
    cfg.TEST.TC_MAX_VIDEOS = within(0, least=0)
    # Folder for predictions as VSPW-style PNGs; "" saves none.
    cfg.TEST.SAVE_PREDICTIONS = ""
