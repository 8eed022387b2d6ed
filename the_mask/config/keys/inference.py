"""Keys of the streams around a model at test time: windows, views, ensembles, refinement, voting."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_keys(cfg: CfgNode) -> None:
    """Add them to ``cfg``, in place."""
    # Sliding window on the network input: [height, width] in pixels; [] runs the model on whole frames.
    cfg.TEST.WINDOW = CfgNode()
    cfg.TEST.WINDOW.SIZE = []
    # Step between windows, [height, width]; [] takes two thirds of SIZE.
    cfg.TEST.WINDOW.STRIDE = []
    # Pad inputs smaller than a window up to it (what a model of one fixed size needs); False runs them as they are.
    cfg.TEST.WINDOW.PAD = True

    # Views of a frame whose scores are averaged: scales of INPUT.TEST's box, each also mirrored with FLIP.
    cfg.TEST.VIEWS = CfgNode()
    cfg.TEST.VIEWS.SCALES = [1.0]
    cfg.TEST.VIEWS.FLIP = False
    # Shortest edge (pixels) that a view may have; 0 takes the model's SIZE_DIVISIBILITY. A scale below it is an error.
    cfg.TEST.VIEWS.MIN_SHORT_EDGE = 0
    # Scores of a view before averaging: "none", "sum-to-one", "softmax" or "temperature" (with TEMPERATURE).
    cfg.TEST.VIEWS.NORMALIZE = "none"
    cfg.TEST.VIEWS.TEMPERATURE = 1.0
    # "arithmetic" or "geometric".
    cfg.TEST.VIEWS.MEAN = "arithmetic"
    # "mmseg" repeats what the papers' code does: scales below MIN_SHORT_EDGE are silently clamped to it and every view
    # passes a (second) softmax. "" does neither.
    cfg.TEST.VIEWS.PARITY = ""

    # Members beside the model of the config itself; each is a config file with its weights, or a folder of scores.
    cfg.TEST.ENSEMBLE = CfgNode()
    cfg.TEST.ENSEMBLE.CONFIGS = []
    # One weights file per entry of CONFIGS.
    cfg.TEST.ENSEMBLE.CHECKPOINTS = []
    # Folders written with TEST.SAVE_SCORES.
    cfg.TEST.ENSEMBLE.SCORES = []
    # Leave the config's own model out: the members are CONFIGS and SCORES alone.
    cfg.TEST.ENSEMBLE.WITHOUT_SELF = False
    # As TEST.VIEWS', for the scores of a member. "sum-to-one" puts mask classification and per-pixel models on a par.
    cfg.TEST.ENSEMBLE.NORMALIZE = "sum-to-one"
    cfg.TEST.ENSEMBLE.MEAN = "arithmetic"
    # One number per member (self, then CONFIGS, then SCORES); [] is 1 for all.
    cfg.TEST.ENSEMBLE.WEIGHTS = []
    # One per member for NORMALIZE "temperature" (tools/fit_temperature.py); [] is 1 for all.
    cfg.TEST.ENSEMBLE.TEMPERATURES = []
    # Folder for the class scores of every frame (fp16, compressed), before refinement and voting; "" saves none.
    cfg.TEST.SAVE_SCORES = ""

    # Boundary IoU beside mIoU: width of the boundary as a share of the frame's diagonal (the paper: 0.02); 0: off.
    cfg.TEST.BOUNDARY_RATIO = 0.0

    # Voting with class-agnostic masks, the last step: "" (none), "files", "sam", "sam2" or "superpixels".
    cfg.TEST.VOTING = CfgNode()
    cfg.TEST.VOTING.MASKS = ""
    # "files": masks as COCO run lengths in FOLDER/<video>/<frame>.json.
    cfg.TEST.VOTING.FOLDER = ""
    # Folder for the masks of the other providers, to be read by "files"; "" saves none.
    cfg.TEST.VOTING.SAVE_MASKS = ""
    # "sam", "sam2": checkpoint, and model type ("vit_h") or config file of SAM 2.
    cfg.TEST.VOTING.WEIGHTS = ""
    cfg.TEST.VOTING.MODEL = "vit_h"
    # "superpixels": about how many per frame, and the weight of place against colour.
    cfg.TEST.VOTING.SEGMENTS = 300
    cfg.TEST.VOTING.COMPACTNESS = 10.0
    # A mask changes nothing where its most frequent class has less than this share (0..1) of it; SSA: 0.
    cfg.TEST.VOTING.MIN_MAJORITY = 0.0
    # Sum the class scores in a mask instead of counting labels.
    cfg.TEST.VOTING.SOFT = False

    # Network that refines masks: "CascadePSP". WIDTH 64 and BLOCKS [3, 4, 6, 3] are the released one's ResNet-50.
    cfg.MODEL.REFINER = CfgNode()
    cfg.MODEL.REFINER.NAME = "CascadePSP"
    cfg.MODEL.REFINER.WIDTH = 64
    cfg.MODEL.REFINER.BLOCKS = [3, 4, 6, 3]
    # Training (tools/train_refiner.py): Adam, falling to a tenth at the given shares of MAX_ITER.
    cfg.MODEL.REFINER.MAX_ITER = 45000
    cfg.MODEL.REFINER.BATCH = 12
    cfg.MODEL.REFINER.CROP = 224
    cfg.MODEL.REFINER.LR = 2.25e-4
    cfg.MODEL.REFINER.WEIGHT_DECAY = 1e-4
    cfg.MODEL.REFINER.STEPS = [0.5, 0.833]

    # Refinement of label maps, before voting: weights of MODEL.REFINER; "" refines nothing.
    cfg.TEST.REFINER = CfgNode()
    cfg.TEST.REFINER.WEIGHTS = ""
    # Classes (train ids) that yield to the others where both are sure.
    cfg.TEST.REFINER.STUFF = []
    # Classes and components of at most this many pixels are left alone.
    cfg.TEST.REFINER.LEAST_AREA = 1024
    # A component is refined if at least this share of the pixels near its contour has its two best classes closer than
    # MARGIN; 0 refines all, as released.
    cfg.TEST.REFINER.MIN_UNCERTAIN = 0.1
    cfg.TEST.REFINER.MARGIN = 0.5
    # Crops are refined with long edges between these, pixels.
    cfg.TEST.REFINER.LONG_EDGE = 900
    cfg.TEST.REFINER.LEAST_EDGE = 224
    # Crops of one size that run together.
    cfg.TEST.REFINER.BATCH = 8
