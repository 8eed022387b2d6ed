"""Trains both stages of a temporal model, single frames and then clips, and evaluates each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from the_mask.config import load_config
from the_mask.engine.run import RunOptions, evaluate_only, run_training

STAGES = ("one_frame", "temporal")
FINAL_WEIGHTS = "model_final.pth"


def _no_step(name: str) -> AbstractContextManager[None]:
    return nullcontext()


def train_two_stage(
    configs: Sequence[str | Path],
    output: Path,
    overrides: Sequence[str] = (),
    *,
    weights: str = "",
    resume: bool = False,
    save_predictions: bool = False,
    step: Callable[[str], AbstractContextManager[None]] = _no_step,
) -> tuple[dict[str, dict[str, float]], list[CfgNode]]:
    """Train stage 1, then stage 2 starting from its final weights; evaluate each on its ``DATASETS.TEST[0]``.

    Args:
        configs: YAML of stage 1 and of stage 2.
        output: stage s writes to ``output/<STAGES[s]>``.
        overrides: ``KEY VALUE ...`` for both stages.
        weights: initial weights of stage 1; "" takes those of its config.
        resume: continue an interrupted run; finished trainings are kept.
        save_predictions: write each stage's label maps to ``predictions`` in its folder.
        step: context manager entered for each part with its name ("train one_frame", "evaluate one_frame", ...).

    Returns:
        Figures by stage, and the config of each stage's evaluation.
    """
    results: dict[str, dict[str, float]] = {}
    finals: list[CfgNode] = []
    for stage, config in zip(STAGES, configs, strict=True):
        folder = output / stage
        results[stage], cfg = train_stage(
            config, folder, overrides, weights=weights, resume=resume, save_predictions=save_predictions, step=step
        )
        weights = cfg.MODEL.WEIGHTS
        finals.append(cfg)
    return results, finals


def train_stage(
    config: str | Path,
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    weights: str = "",
    resume: bool = False,
    save_predictions: bool = False,
    step: Callable[[str], AbstractContextManager[None]] = _no_step,
) -> tuple[dict[str, float], CfgNode]:
    """Train one config into ``folder``, whose name is that of its steps, and evaluate it; as :func:`train_two_stage`.

    Returns:
        Figures on ``DATASETS.TEST[0]``, and the evaluation's config, whose ``MODEL.WEIGHTS`` are the last ones.
    """
    common = [*overrides, "OUTPUT_DIR", str(folder)]
    start = ["MODEL.WEIGHTS", weights] if weights else []
    with step(f"train {folder.name}"):
        # Evaluated once, after the training.
        run_training(RunOptions(Path(config), [*common, *start, "TEST.EVAL_PERIOD", "-1"], resume=resume))
    final = ["MODEL.WEIGHTS", str(folder / FINAL_WEIGHTS)]
    if save_predictions:
        final += ["TEST.SAVE_PREDICTIONS", str(folder / "predictions")]
    with step(f"evaluate {folder.name}"):
        cfg = load_config(config, [*common, *final])
        return _first_figures(cfg), cfg


def evaluate_branches(cfg: CfgNode) -> dict[str, dict[str, float]]:
    """Evaluate the clip branch and the frame branch of a temporal model separately, from its evaluation config."""
    results = {}
    for name, weight in (("clip branch", 1.0), ("frame branch", 0.0)):
        alone = cfg.clone()
        alone.defrost()
        alone.MODEL.THE_MASK.CLIP_SCORE_WEIGHT = weight
        alone.TEST.SAVE_PREDICTIONS = ""
        results[name] = _first_figures(alone)
    return results


def _first_figures(cfg: CfgNode) -> dict[str, float]:
    """Figures on the first test set."""
    figures: dict[str, Any] = evaluate_only(cfg)
    return (figures if "sem_seg" in figures else figures[cfg.DATASETS.TEST[0]])["sem_seg"]
