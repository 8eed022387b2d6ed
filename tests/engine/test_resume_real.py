"""The real model on real clips: interrupted and resumed equals uninterrupted, bit for bit."""

import signal
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from engine_fakes import CONFIGS, DEBUG, assert_same, debug_cfg, hooked, weights

from the_mask.engine import Trainer, TrainingInterrupted
from the_mask.weights import read_checkpoint


def _run(cfg: CfgNode, stop_at: int | None = None) -> Trainer:
    trainer = Trainer(cfg)
    trainer.resume_or_load(True)
    if stop_at is not None:
        trainer.register_hooks([hooked(lambda t: signal.raise_signal(signal.SIGINT), stop_at)])
        with pytest.raises(TrainingInterrupted):
            trainer.train()
    else:
        trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        (DEBUG, ["DATALOADER.NUM_WORKERS", 2, "MODEL.RESNETS.NORM", "BN", "TEST.EVAL_PERIOD", 2]),
        (
            CONFIGS / "debug" / "the_mask_debug_video.yaml",
            [
                *("SOLVER.EMA.ENABLED", True, "MODEL.MASK_FORMER.DROPOUT", 0.1, "SOLVER.ACCUM_STEPS", 2),
                *("MODEL.THE_MASK.INIT_FROM_STAGE1", False, "MODEL.THE_MASK.TRAINABLE", []),
            ],
        ),
    ],
    ids=["image", "video"],
)
def test_interrupted_equals_uninterrupted(tiny_shapes: Path, tmp_path: Path, config: Path, overrides: list) -> None:
    overrides = [*overrides, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 0]
    whole = _run(debug_cfg(tmp_path / "whole", *overrides, config=config))
    parts = debug_cfg(tmp_path / "parts", *overrides, config=config)
    _run(parts, stop_at=1)
    torch.manual_seed(123)
    second = _run(parts)
    assert second.start_iter == 2
    assert_same(weights(whole), weights(second))
    final = [read_checkpoint(tmp_path / run / "model_final.pth") for run in ("whole", "parts")]
    assert_same(final[0]["trainer"]["optimizer"], final[1]["trainer"]["optimizer"])
    assert_same(final[0]["rng"], final[1]["rng"])
    if "ema" in final[0]:
        assert_same(final[0]["ema"], final[1]["ema"])
    if whole.results:
        ours, theirs = whole.results["sem_seg"], second.results["sem_seg"]
        assert ours["mIoU"] == theirs["mIoU"]


def test_bf16_on_the_cpu(tiny_shapes: Path, tmp_path: Path) -> None:
    full = _run(debug_cfg(tmp_path / "full", "SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 0))
    half = Trainer(debug_cfg(tmp_path / "half", "SOLVER.MAX_ITER", 2, "SOLVER.AMP.ENABLED", True))
    seen = set()
    predictor = half.model.sem_seg_head.predictor
    predictor.class_embed.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    half.train()
    assert seen == {torch.bfloat16}
    losses = [t.storage.history("total_loss").values()[0][0] for t in (full, half)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert all(torch.isfinite(value).all() for value in weights(half).values())


def test_stage_2_starts_from_stage_1(tiny_shapes: Path, tmp_path: Path) -> None:
    one = CONFIGS / "debug" / "the_mask_debug_1f.yaml"
    video = CONFIGS / "debug" / "the_mask_debug_video.yaml"
    first = _run(debug_cfg(tmp_path / "one", "SOLVER.MAX_ITER", 1, config=one))
    start = ["MODEL.WEIGHTS", str(tmp_path / "one" / "model_final.pth"), "MODEL.THE_MASK.INIT_FROM_STAGE1", True]
    trainable = ["MODEL.THE_MASK.TRAINABLE", ["predictor"]]
    trainer = Trainer(debug_cfg(tmp_path / "two", "SOLVER.MAX_ITER", 1, *start, *trainable, config=video))
    trainer.resume_or_load(False)
    trainer.train()
    before, after = weights(first), weights(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before if "predictor" not in name)
    head = "sem_seg_head.predictor."
    assert not torch.equal(after[f"{head}class_embed.weight"], before[f"{head}class_embed.weight"])
    assert not trainer.model.backbone.training
    # A stage-2 run resumes from its own checkpoint, not from stage 1 again.
    again = Trainer(debug_cfg(tmp_path / "two", "SOLVER.MAX_ITER", 2, *start, *trainable, config=video))
    again.resume_or_load(True)
    assert again.completed == 1
    assert_same(weights(again), after)


def test_channels_last_changes_the_layout_and_nothing_else(tiny_shapes: Path, tmp_path: Path) -> None:
    losses, layouts = [], []
    for last in (False, True):
        trainer = Trainer(debug_cfg(tmp_path / str(last), "SOLVER.MAX_ITER", 2, "MODEL.CHANNELS_LAST", last))
        convolutions = [m.weight for m in trainer.model.modules() if isinstance(m, torch.nn.Conv2d)]
        layouts.append(all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions))
        trainer.train()
        losses.append(trainer.storage.history("total_loss").values())
    assert layouts == [False, True]
    assert [value for value, _ in losses[0]] == pytest.approx([value for value, _ in losses[1]], rel=1e-3)
