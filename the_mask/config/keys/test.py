"""Keys of testing and its metrics."""

from __future__ import annotations

from the_mask.config.options import Options, within


class TestOptions(Options, group="TEST"):
    """Clips or streams, and what is measured and kept."""

    # Clips of this many frames, CLIP_STRIDE apart, tile every test video; each frame is predicted once.
    clip_length: int = within(1, 1, 65536)
    clip_stride: int = within(1, 1, 65536)
    # Clips per forward pass.
    clips_per_batch: int = within(1, 1, 65536)
    # Feed videos frame by frame through StreamingSegmentor instead of tiled clips.
    streaming: bool = False
    # Window lengths of video consistency.
    vc_windows: tuple[int, ...] = (8, 16)
    # Weights of torchvision's RAFT for temporal consistency (TC); "" leaves TC out.
    tc_flow_weights: str = ""
    # TC over the first this many videos (the official VSPW script: 100); 0 takes all.
    tc_max_videos: int = within(0, least=0)
    # Folder for predictions as VSPW-style PNGs; "" saves none.
    save_predictions: str = ""
    # HTML file for a report of the evaluation, written by one process; "" writes none. Of several test sets, each gets
    # a file of its own, with the name of the set.
    save_report: str = ""
