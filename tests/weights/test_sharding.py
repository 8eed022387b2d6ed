"""MODEL.PARALLEL fsdp2: sharded and plain training agree; checkpoints in parts go on anywhere."""

from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from engine_fakes import FakeTrainer, debug_cfg, fake_cfg
from tolerances import approx, assert_close
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from the_mask.config import load_config
from the_mask.data import register_all
from the_mask.engine import Trainer, launch
from the_mask.weights import load_weights, read_checkpoint
from the_mask.weights.sharding import wants_sharding


def train(trainer, resume=False):
    trainer.resume_or_load(resume)
    losses = []
    record = trainer._record

    def keep(found, *rest):
        losses.append(found)
        return record(found, *rest)

    trainer._record = keep
    trainer.train()
    return losses


def train_fakes(folder, runs):
    """In each process: the fake model, and its continuation."""
    losses = [train(FakeTrainer(cfg), resume) for cfg, resume in runs]
    torch.save(losses, Path(folder) / f"results{comm.get_rank()}.pth")


def train_segmentor(root, cfg):
    """In each process: the segmentor of a config, and how it is divided."""
    register_all(root)
    trainer = Trainer(cfg)
    facts = {
        "sharded": sum(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()),
        "units": sum(isinstance(module, FSDPModule) for module in trainer.model.modules()),
    }
    facts["losses"] = train(trainer)
    torch.save(facts, Path(cfg.OUTPUT_DIR) / f"results{comm.get_rank()}.pth")


FAKE = [
    *("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.IMS_PER_BATCH", 8, "SOLVER.ACCUM_STEPS", 2),
    *("SOLVER.EMA.ENABLED", True, "TEST.EVAL_PERIOD", 4),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Losses of two processes, plain and sharded, each with a run of 4 iterations continued to 6."""
    found = {}
    for mode in ("none", "fsdp2"):
        folder = tmp_path_factory.mktemp(mode)
        (folder / "fake").mkdir()
        parallel = ["MODEL.PARALLEL", mode]
        first = fake_cfg(folder / "fake", *FAKE, *parallel)
        longer = fake_cfg(folder / "fake", *FAKE, *parallel, "SOLVER.MAX_ITER", 6)
        launch(train_fakes, (str(folder), [(first, False), (longer, True)]), num_processes=2)
        found[mode] = folder
    return found


def test_same_losses(runs):
    for rank in (0, 1):
        plain, sharded = (torch.load(runs[mode] / f"results{rank}.pth", weights_only=True) for mode in runs)
        assert len(plain[0]) == 4
        assert len(plain[1]) == 2
        for run in (0, 1):
            for a, b in zip(plain[run], sharded[run], strict=True):
                assert a == approx(b, "formula")


def test_checkpoints_in_parts(runs, tmp_path):
    folder = runs["fsdp2"] / "fake"
    assert (folder / "model_final.pth").is_file()
    assert [len(list(folder.glob(f"model_final.pth.*.part{rank}of2"))) for rank in (0, 1)] == [1, 1]
    plain, sharded = (read_checkpoint(runs[mode] / "fake" / "model_final.pth") for mode in runs)
    assert set(plain["model"]) == set(sharded["model"])
    for kind in ("model", "ema"):
        ours, theirs = (state[kind].get("average", state[kind]) for state in (plain, sharded))
        for name, value in ours.items():
            assert_close(theirs[name], value, "sum")
    # One process reads them: as weights, and to continue.
    model = FakeTrainer.build_model(fake_cfg(tmp_path))
    report = load_weights(model, folder / "model_final.pth", strict=True, use_ema=False)
    assert not report.mismatched
    assert all(torch.equal(value, sharded["model"][name]) for name, value in model.state_dict().items())
    alone = FakeTrainer(fake_cfg(folder, *FAKE, "SOLVER.MAX_ITER", 7, "SOLVER.ACCUM_STEPS", 4))
    assert len(train(alone, resume=True)) == 1


def test_a_missing_part(runs):
    part = min((runs["fsdp2"] / "fake").glob("model_0*.pth.*.part1of2"))
    part.unlink()
    path = part.with_name(part.name.partition(".pth")[0] + ".pth")
    with pytest.raises(ValueError, match=r"written by 2 processes; its part .*part1of2: it is missing"):
        read_checkpoint(path)


@pytest.mark.slow
def test_a_segmentor(tiny_shapes, tmp_path):
    """The debug Mask2Former: blocks are units of their own, losses equal plain training's."""
    options = ["SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.CHECKPOINT_PERIOD", 0, "TEST.EVAL_PERIOD", 2]
    options += ["SOLVER.OPTIMIZER", "SGD", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1.0]
    options += ["MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO", 0.0]
    found = []
    for mode in ("none", "fsdp2"):
        folder = tmp_path / mode
        folder.mkdir()
        cfg = debug_cfg(folder, *options, "MODEL.PARALLEL", mode)
        launch(train_segmentor, (str(tiny_shapes), cfg), num_processes=2)
        found.append(torch.load(folder / "results0.pth", weights_only=True))
    plain, sharded = found
    assert plain["sharded"] == 0
    assert sharded["sharded"] > 100
    assert sharded["units"] > 3
    for a, b in zip(plain["losses"], sharded["losses"], strict=True):
        assert a == approx(b, "sum")


def test_bad_modes():
    with pytest.raises(ValueError, match=r"MODEL.PARALLEL='ddp': must be one of none, fsdp2"):
        wants_sharding(load_config(None, ["MODEL.PARALLEL", "ddp"]))
    fp16 = load_config(None, ["MODEL.PARALLEL", "fsdp2", "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "fp16"])
    with pytest.raises(ValueError, match=r"fsdp2 goes with SOLVER.AMP.PRECISION bf16"):
        wants_sharding(fp16)
    with pytest.raises(ValueError, match=r"turn MODEL.CHANNELS_LAST off"):
        wants_sharding(load_config(None, ["MODEL.PARALLEL", "fsdp2", "MODEL.CHANNELS_LAST", True]))
    # One process has nobody to share with.
    assert not wants_sharding(load_config(None, ["MODEL.PARALLEL", "fsdp2"]))
