"""Keys of testing and its metrics."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_keys(cfg: CfgNode) -> None:
    """Add them to ``cfg``, in place."""
    # Clips of this many frames, CLIP_STRIDE apart, tile every test video; each frame is predicted once.
    cfg.TEST.CLIP_LENGTH = 1
    cfg.TEST.CLIP_STRIDE = 1
    # Clips per forward pass.
    cfg.TEST.CLIPS_PER_BATCH = 1
    # Feed videos frame by frame through StreamingSegmentor instead of tiled clips.
    cfg.TEST.STREAMING = False
    # Window lengths of video consistency.
    cfg.TEST.VC_WINDOWS = [8, 16]
    # Weights of torchvision's RAFT for temporal consistency (TC); "" leaves TC out.
    cfg.TEST.TC_FLOW_WEIGHTS = ""
    # TC over the first this many videos (the official VSPW script: 100); 0 takes all.
    cfg.TEST.TC_MAX_VIDEOS = 0
    # Folder for predictions as VSPW-style PNGs; "" saves none.
    cfg.TEST.SAVE_PREDICTIONS = ""
