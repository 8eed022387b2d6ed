"""The default config, without the nodes that only object detection reads."""

from __future__ import annotations

from .config import CfgNode

_MODEL = {
    "LOAD_PROPOSALS": False,
    "MASK_ON": False,
    "KEYPOINT_ON": False,
    "DEVICE": "cuda",
    "META_ARCHITECTURE": "GeneralizedRCNN",
    "WEIGHTS": "",
    # Of BGR pixels in 0..255.
    "PIXEL_MEAN": [103.53, 116.28, 123.675],
    "PIXEL_STD": [1.0, 1.0, 1.0],
    "BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 2},
    "FPN": {"IN_FEATURES": [], "OUT_CHANNELS": 256, "NORM": "", "FUSE_TYPE": "sum"},
    "RESNETS": {
        "DEPTH": 50,
        "OUT_FEATURES": ["res4"],
        "NUM_GROUPS": 1,
        "NORM": "FrozenBN",
        "WIDTH_PER_GROUP": 64,
        # True is right for weights of Caffe origin, False for those of torchvision.
        "STRIDE_IN_1X1": True,
        "RES5_DILATION": 1,
        "RES2_OUT_CHANNELS": 256,
        "STEM_OUT_CHANNELS": 64,
        "DEFORM_ON_PER_STAGE": [False, False, False, False],
        "DEFORM_MODULATED": False,
        "DEFORM_NUM_GROUPS": 1,
    },
    "SEM_SEG_HEAD": {
        "NAME": "SemSegFPNHead",
        "IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "IGNORE_VALUE": 255,
        "NUM_CLASSES": 54,
        "CONVS_DIM": 128,
        "COMMON_STRIDE": 4,
        "NORM": "GN",
        "LOSS_WEIGHT": 1.0,
    },
}

_INPUT = {
    "MIN_SIZE_TRAIN": (800,),
    "MIN_SIZE_TRAIN_SAMPLING": "choice",
    "MAX_SIZE_TRAIN": 1333,
    "MIN_SIZE_TEST": 800,
    "MAX_SIZE_TEST": 1333,
    "RANDOM_FLIP": "horizontal",
    "CROP": {"ENABLED": False, "TYPE": "relative_range", "SIZE": [0.9, 0.9]},
    "FORMAT": "BGR",
    "MASK_FORMAT": "polygon",
}

_DATASETS = {
    "TRAIN": (),
    "PROPOSAL_FILES_TRAIN": (),
    "PRECOMPUTED_PROPOSAL_TOPK_TRAIN": 2000,
    "TEST": (),
    "PROPOSAL_FILES_TEST": (),
    "PRECOMPUTED_PROPOSAL_TOPK_TEST": 1000,
}

_DATALOADER = {
    "NUM_WORKERS": 4,
    "ASPECT_RATIO_GROUPING": True,
    "SAMPLER_TRAIN": "TrainingSampler",
    "REPEAT_THRESHOLD": 0.0,
    "REPEAT_SQRT": True,
    "FILTER_EMPTY_ANNOTATIONS": True,
}

_SOLVER = {
    "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "MAX_ITER": 40000,
    "BASE_LR": 0.001,
    "BASE_LR_END": 0.0,
    "MOMENTUM": 0.9,
    "NESTEROV": False,
    "WEIGHT_DECAY": 0.0001,
    "WEIGHT_DECAY_NORM": 0.0,
    "GAMMA": 0.1,
    "STEPS": (30000,),
    "NUM_DECAYS": 3,
    "WARMUP_FACTOR": 1.0 / 1000,
    "WARMUP_ITERS": 1000,
    "WARMUP_METHOD": "linear",
    "RESCALE_INTERVAL": False,
    "CHECKPOINT_PERIOD": 5000,
    "IMS_PER_BATCH": 16,
    "REFERENCE_WORLD_SIZE": 0,
    "BIAS_LR_FACTOR": 1.0,
    "WEIGHT_DECAY_BIAS": None,
    "CLIP_GRADIENTS": {"ENABLED": False, "CLIP_TYPE": "value", "CLIP_VALUE": 1.0, "NORM_TYPE": 2.0},
    "AMP": {"ENABLED": False},
}

_TEST = {
    "EXPECTED_RESULTS": [],
    "EVAL_PERIOD": 0,
    "KEYPOINT_OKS_SIGMAS": [],
    "DETECTIONS_PER_IMAGE": 100,
    "AUG": {
        "ENABLED": False,
        "MIN_SIZES": (400, 500, 600, 700, 800, 900, 1000, 1100, 1200),
        "MAX_SIZE": 4000,
        "FLIP": True,
    },
    "PRECISE_BN": {"ENABLED": False, "NUM_ITER": 200},
}

_C = CfgNode(
    {
        "VERSION": 2,
        "MODEL": _MODEL,
        "INPUT": _INPUT,
        "DATASETS": _DATASETS,
        "DATALOADER": _DATALOADER,
        "SOLVER": _SOLVER,
        "TEST": _TEST,
        "OUTPUT_DIR": "./output",
        "SEED": -1,
        "CUDNN_BENCHMARK": False,
        "FLOAT32_PRECISION": "",
        "VIS_PERIOD": 0,
        "GLOBAL": {"HACK": 1.0},
    }
)
