"""Keys of the streams around a model at test time: windows, views, ensembles, refinement, voting."""

from __future__ import annotations

from the_mask.config.options import Options, within


class WindowOptions(Options, group="TEST.WINDOW"):
    """Sliding window on the network input."""

    # [height, width] in pixels; [] runs the model on whole frames.
    size: tuple[int, ...] = ()
    # Step between windows, [height, width]; [] takes two thirds of SIZE.
    stride: tuple[int, ...] = ()
    # Pad inputs smaller than a window up to it (what a model of one fixed size needs); False runs them as they are.
    pad: bool = True


class ViewOptions(Options, group="TEST.VIEWS"):
    """Views of a frame whose scores are averaged: scales of INPUT.TEST's box, each also mirrored with FLIP."""

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    # Shortest edge (pixels) that a view may have; 0 takes the model's SIZE_DIVISIBILITY. A scale below it is an error.
    min_short_edge: int = 0
    # Scores of a view before averaging: "none", "sum-to-one", "softmax" or "temperature" (with TEMPERATURE).
    normalize: str = "none"
    temperature: float = 1.0
    # "arithmetic" or "geometric".
    mean: str = "arithmetic"
    # "mmseg" repeats what the papers' code does: scales below MIN_SHORT_EDGE are silently clamped to it and every view
    # passes a (second) softmax. "" does neither.
    parity: str = ""


class EnsembleOptions(Options, group="TEST.ENSEMBLE"):
    """Members besides the model of the config; each is a config file with its weights, or a folder of scores."""

    configs: tuple[str, ...] = ()
    # One weights file per entry of CONFIGS.
    checkpoints: tuple[str, ...] = ()
    # Folders written with TEST.SAVE_SCORES.
    scores: tuple[str, ...] = ()
    # Leave the config's own model out: the members are CONFIGS and SCORES alone.
    without_self: bool = False
    # As in TEST.VIEWS, for scores of a member. "sum-to-one" makes mask classification and per-pixel models comparable.
    normalize: str = "sum-to-one"
    mean: str = "arithmetic"
    # One number per member (self, then CONFIGS, then SCORES); [] is 1 for all.
    weights: tuple[float, ...] = ()
    # One per member for NORMALIZE "temperature" (tools/fit_temperature.py); [] is 1 for all.
    temperatures: tuple[float, ...] = ()


class ScoreOptions(Options, group="TEST"):
    """Scores and their measures."""

    # Folder for the class scores of every frame (fp16, compressed), before refinement and voting; "" saves none.
    save_scores: str = ""
    # Also compute boundary IoU: width of the boundary as a share of the frame's diagonal (the paper: 0.02); 0: off.
    boundary_ratio: float = 0.0


class VotingOptions(Options, group="TEST.VOTING"):
    """Voting with class-agnostic masks, the last step."""

    # Where they come from: "" (no voting), "files", "sam", "sam2" or "superpixels".
    masks: str = ""
    # "files": masks as COCO run lengths in FOLDER/<video>/<frame>.json.
    folder: str = ""
    # Folder for the masks of the other providers, to be read by "files"; "" saves none.
    save_masks: str = ""
    # "sam", "sam2": checkpoint, and model type ("vit_h") or config file of SAM 2.
    weights: str = ""
    model: str = "vit_h"
    # "superpixels": about how many per frame, and the weight of place against colour.
    segments: int = 300
    compactness: float = 10.0
    # A mask changes nothing where its most frequent class has less than this share (0..1) of it; SSA: 0.
    min_majority: float = 0.0
    # Sum the class scores in a mask instead of counting labels.
    soft: bool = False


class RefinerOptions(Options, group="MODEL.REFINER"):
    """Network that refines masks, and its training (tools/train_refiner.py)."""

    name: str = "CascadePSP"
    # WIDTH 64 and BLOCKS [3, 4, 6, 3] are the released one's ResNet-50.
    width: int = 64
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    # Adam, falling to a tenth at the given shares of MAX_ITER.
    max_iter: int = 45000
    batch: int = 12
    crop: int = 224
    lr: float = 0.000225
    weight_decay: float = 0.0001
    steps: tuple[float, ...] = (0.5, 0.833)


class RefinementOptions(Options, group="TEST.REFINER"):
    """Refinement of label maps, before voting."""

    # Weights of MODEL.REFINER; "" refines nothing.
    weights: str = ""
    # Classes (train ids) that the others overwrite where both have a high score.
    stuff: tuple[int, ...] = ()
    # Classes and components of at most this many pixels are left alone.
    least_area: int = 1024
    # A component is refined if at least this share of the pixels near its contour has its two best classes closer than
    # MARGIN; 0 refines all, as released.
    min_uncertain: float = within(0.1, 0, 1)
    margin: float = 0.5
    # Crops are refined with long edges between these, pixels.
    long_edge: int = 900
    least_edge: int = 224
    # Crops of one size that run together.
    batch: int = within(8, least=1)

    def check(self) -> None:
        if self.least_edge > self.long_edge:
            raise ValueError(
                f"TEST.REFINER: expected LEAST_EDGE <= LONG_EDGE, got {self.least_edge} and {self.long_edge}"
            )
