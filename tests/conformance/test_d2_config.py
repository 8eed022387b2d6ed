"""Documented behaviour of detectron2.config: the same on the embedded runtime and on a real Detectron2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, configurable, get_cfg, global_cfg, set_global_cfg

# What the_mask and Mask2Former-like projects take for granted.
DEFAULTS = {
    "VERSION": 2,
    "MODEL.DEVICE": "cuda",
    "MODEL.WEIGHTS": "",
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 2,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "MODEL.RESNETS.OUT_FEATURES": ["res4"],
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
    "MODEL.RESNETS.RES5_DILATION": 1,
    "MODEL.SEM_SEG_HEAD.NAME": "SemSegFPNHead",
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": 255,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 54,
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": 1.0,
    "MODEL.FPN.OUT_CHANNELS": 256,
    "INPUT.FORMAT": "BGR",
    "INPUT.MIN_SIZE_TRAIN": (800,),
    "INPUT.CROP.ENABLED": False,
    "INPUT.CROP.TYPE": "relative_range",
    "INPUT.CROP.SIZE": [0.9, 0.9],
    "DATASETS.TRAIN": (),
    "DATASETS.TEST": (),
    "DATALOADER.NUM_WORKERS": 4,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.MAX_ITER": 40000,
    "SOLVER.STEPS": (30000,),
    "SOLVER.WARMUP_FACTOR": 0.001,
    "SOLVER.WARMUP_METHOD": "linear",
    "SOLVER.WEIGHT_DECAY": 0.0001,
    "SOLVER.CHECKPOINT_PERIOD": 5000,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "value",
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": 2.0,
    "SOLVER.AMP.ENABLED": False,
    "TEST.EVAL_PERIOD": 0,
    "TEST.EXPECTED_RESULTS": [],
    "OUTPUT_DIR": "./output",
    "SEED": -1,
    "CUDNN_BENCHMARK": False,
    "FLOAT32_PRECISION": "",
    "VIS_PERIOD": 0,
    "GLOBAL.HACK": 1.0,
}


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(text: str, **kwargs: bool) -> CfgNode:
    Path("config.yaml").write_text(text)
    cfg = get_cfg()
    cfg.merge_from_file("config.yaml", **kwargs)
    return cfg


@pytest.mark.parametrize("key", DEFAULTS)
def test_defaults(key: str) -> None:
    value = get_cfg()
    for part in key.split("."):
        value = value[part]
    assert value == DEFAULTS[key]
    assert type(value) is type(DEFAULTS[key])


def test_get_cfg_returns_independent_copies() -> None:
    first, second = get_cfg(), get_cfg()
    first.MODEL.DEVICE = "nowhere"
    first.MODEL.PIXEL_MEAN.append(1.0)
    assert second.MODEL.DEVICE == "cuda"
    assert len(get_cfg().MODEL.PIXEL_MEAN) == 3


def test_merge_from_file_with_base(in_tmp: Path) -> None:
    Path("base.yaml").write_text("SEED: 7\nOUTPUT_DIR: there\nMODEL:\n  RESNETS:\n    DEPTH: 18\n")
    cfg = merged("_BASE_: base.yaml\nSEED: 8\nMODEL:\n  RESNETS:\n    NORM: BN\n")
    assert (cfg.SEED, cfg.OUTPUT_DIR, cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NORM) == (8, "there", 18, "BN")


def test_a_list_becomes_the_tuple_of_the_default(in_tmp: Path) -> None:
    assert merged("SOLVER:\n  STEPS: [3, 4]\n").SOLVER.STEPS == (3, 4)


@pytest.mark.parametrize("text", ["NO_SUCH_KEY: 1", "MODEL:\n  NO_SUCH_KEY: 1"])
def test_unknown_key(in_tmp: Path, text: str) -> None:
    with pytest.raises(KeyError, match="NO_SUCH_KEY"):
        merged(text)


def test_wrong_type(in_tmp: Path) -> None:
    with pytest.raises(ValueError, match="SEED"):
        merged("SEED: word")


def test_newer_version_is_refused(in_tmp: Path) -> None:
    with pytest.raises(AssertionError, match="v3"):
        merged("VERSION: 3\n")


def test_no_version_means_the_latest(in_tmp: Path) -> None:
    assert merged("SEED: 1\n").VERSION == 2


def test_missing_file(in_tmp: Path) -> None:
    with pytest.raises(AssertionError, match=r"nothing\.yaml"):
        get_cfg().merge_from_file("nothing.yaml")


def test_yaml_that_runs_code_only_where_allowed(in_tmp: Path) -> None:
    text = "OUTPUT_DIR: !!python/object/apply:os.getcwd []\n"
    assert os.getcwd() == merged(text).OUTPUT_DIR  # upstream's default is to trust the file
    with pytest.raises(yaml.constructor.ConstructorError):
        merged(text, allow_unsafe=False)


def test_merge_from_list() -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["SEED", "5", "SOLVER.BASE_LR", "0.5", "DATASETS.TRAIN", "('a', 'b')", "MODEL.DEVICE", "cpu"])
    assert (cfg.SEED, cfg.SOLVER.BASE_LR, cfg.DATASETS.TRAIN, cfg.MODEL.DEVICE) == (5, 0.5, ("a", "b"), "cpu")
    with pytest.raises((KeyError, AssertionError)):
        cfg.merge_from_list(["SEAD", "5"])


def test_freeze_and_computed_keys() -> None:
    cfg = get_cfg()
    cfg.NEW_KEY = 1
    cfg.COMPUTED_KEY = 1
    with pytest.raises(KeyError):
        cfg.COMPUTED_KEY = 2
    cfg.freeze()
    with pytest.raises(AttributeError):
        cfg.SEED = 1
    cfg.defrost()
    cfg.SEED = 1
    assert yaml.safe_load(CfgNode({"A": {"B": (1, 2)}, "C": None}).dump()) == {"A": {"B": [1, 2]}, "C": None}


def test_dump_can_be_merged_again(in_tmp: Path) -> None:
    cfg = get_cfg()
    cfg.SEED, cfg.SOLVER.STEPS = 11, (1, 2)
    again = merged(cfg.dump(), allow_unsafe=False)
    for key in ("VERSION", "INPUT", "DATASETS", "DATALOADER", "SOLVER", "TEST", "SEED", "OUTPUT_DIR"):
        assert again[key] == cfg[key], key


def test_global_cfg() -> None:
    cfg = get_cfg()
    cfg.SEED = 99
    set_global_cfg(cfg)
    assert global_cfg.SEED == 99


class Base:
    @configurable
    def __init__(self, a: int, b: int = 2, *, c: int = 3) -> None:
        self.values = (a, b, c)

    @classmethod
    def from_config(cls, cfg: CfgNode, b: int = 5) -> dict[str, int]:
        return {"a": cfg.SEED, "b": b}


class Child(Base):
    pass


class Extended(Base):
    @configurable
    def __init__(self, extra: int, **kwargs: int) -> None:
        super().__init__(**kwargs)
        self.extra = extra

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, int]:
        return {**super().from_config(cfg), "extra": 4}


def test_configurable_class() -> None:
    cfg = get_cfg()
    assert Base(cfg).values == (-1, 5, 3)
    assert Base(cfg=cfg, b=8).values == (-1, 8, 3)
    assert Base(cfg, 7).values == (-1, 7, 3)
    assert Base(1, c=4).values == (1, 2, 4)
    # What from_config does not take overrides what it returns.
    assert Base(cfg, c=9).values == (-1, 5, 9)
    assert Base(cfg, a=11).values == (11, 5, 3)
    assert Child(cfg).values == (-1, 5, 3)
    assert (Extended(cfg).values, Extended(cfg).extra, Extended(cfg, extra=6).extra) == ((-1, 5, 3), 4, 6)
    with pytest.raises(TypeError):
        Base(cfg, unknown=1)


def from_cfg(cfg: CfgNode, b: int = 1) -> dict[str, int]:
    return {"a": cfg.SEED, "b": b}


@configurable(from_config=from_cfg)
def function(a: int, b: int = 3, *, c: int = 4) -> tuple[int, int, int]:
    """Docstring."""
    return a, b, c


def test_configurable_function() -> None:
    cfg = get_cfg()
    assert function(cfg) == (-1, 1, 4)
    assert function(cfg, b=9, c=8) == (-1, 9, 8)
    assert function(7) == (7, 3, 4)
    assert (function.__name__, function.__doc__) == ("function", "Docstring.")


def test_wrong_uses_of_configurable() -> None:
    cfg = get_cfg()

    class WithoutFromConfig:
        @configurable
        def __init__(self, a: int) -> None: ...

    class NotAClassMethod:
        @configurable
        def __init__(self, a: int) -> None: ...

        def from_config(self, cfg: CfgNode) -> dict[str, int]:
            return {"a": 1}

    class WrongParameterName:
        @configurable
        def __init__(self, a: int) -> None: ...

        @classmethod
        def from_config(cls, config: CfgNode) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(AttributeError, match="from_config"):
        WithoutFromConfig(cfg)
    with pytest.raises(TypeError, match="classmethod"):
        NotAClassMethod(cfg)
    with pytest.raises(TypeError, match="cfg"):
        WrongParameterName(cfg)
    with pytest.raises(AssertionError):
        configurable(from_config=3)
    with pytest.raises(AssertionError):

        @configurable
        def not_an_init(a: int) -> None: ...
