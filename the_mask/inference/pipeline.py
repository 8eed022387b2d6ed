"""The test-time pipeline of a config: window -> views -> stream -> stages -> ensemble -> finish, outermost last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from torch import Tensor, nn

from the_mask.config import load_config
from the_mask.data.class_names import config_classes
from the_mask.data.io import read_image
from the_mask.inference.class_refine import ClassRefinement
from the_mask.inference.ensemble import EnsembleRunner, Member, step_named
from the_mask.inference.mask_generators import PROVIDERS, build_mask_generator
from the_mask.inference.merge import PARITIES, check_merge, score_labels
from the_mask.inference.saved_scores import SavedScores, ScoreWriter
from the_mask.inference.stages import StageRunner
from the_mask.inference.stream import StreamingSegmentor
from the_mask.inference.views import FrameName, ViewRunner, make_views
from the_mask.inference.voting import MaskVoting
from the_mask.inference.window import WindowRunner
from the_mask.weights.trained import trained_refiner

Clip = Mapping[str, Any]
StreamState = dict[str, Any]
# (frame uint8 [H, W, 3], labels [H, W], scores [K, H, W], name) -> labels [H, W]; labels are on the CPU.
FinishStep = Callable[[np.ndarray, Tensor, Tensor, FrameName | None], Tensor]


class Pipeline:
    """Scores of a runner, saved if wanted, then turned into labels by refinement and voting.

    A stream (``init_state``, ``step``), and a predictor of test clips where its scorer is one.

    Args:
        scorer: a stream with output "scores".
        finish: steps from labels to labels, in order.
        writer: where scores are saved, before the steps.
    """

    uses_names = True

    def __init__(self, scorer: Any, finish: Sequence[FinishStep] = (), writer: ScoreWriter | None = None) -> None:
        self.scorer = scorer
        self.finish = list(finish)
        self.writer = writer

    @property
    def num_classes(self) -> int:
        """K."""
        return self.scorer.num_classes

    def init_state(self) -> StreamState:
        """State before a video."""
        return self.scorer.init_state()

    def step(
        self, frame: np.ndarray | Tensor, state: StreamState, name: FrameName | None = None
    ) -> tuple[Tensor, StreamState]:
        """Labels [H, W] of the next frame, uint8 RGB [H, W, 3], called ``name`` (video, frame)."""
        scores, state = step_named(self.scorer, frame, state, name)
        return self._finish(lambda: np.asarray(frame), scores, name), state

    def predict(self, clips: Sequence[Clip]) -> list[list[Tensor]]:
        """Label maps [height, width] of the frames of test clips."""
        return [
            [
                self._finish(lambda file=file: read_image(file), scores, (clip["video_id"], frame_id))  # type: ignore[misc]
                for scores, frame_id, file in zip(
                    self.scorer.clip_scores(clip), clip["frame_ids"], clip["file_names"], strict=True
                )
            ]
            for clip in clips
        ]

    def _finish(self, image: Callable[[], np.ndarray], scores: Tensor, name: FrameName | None) -> Tensor:
        if self.writer is not None:
            if name is None:
                raise ValueError("TEST.SAVE_SCORES names files after video and frame, but the frame has no name")
            self.writer.write(name, scores)
        labels = score_labels(scores)
        picture = image() if self.finish else None
        for step in self.finish:
            assert picture is not None
            labels = step(picture, labels, scores, name)
        return labels


def uses_runners(cfg: CfgNode) -> bool:
    """Whether a config asks for anything beyond the plain model."""
    test = cfg.TEST
    views = test.VIEWS
    return bool(
        test.WINDOW.SIZE
        or list(views.SCALES) != [1.0]
        or views.FLIP
        or views.NORMALIZE != "none"
        or views.PARITY
        or is_ensemble(cfg)
        or test.STAGES.COUNT
        or test.SAVE_SCORES
        or test.REFINER.WEIGHTS
        or test.VOTING.MASKS
    )


def config_problems(cfg: CfgNode) -> Iterator[str]:
    """What is wrong with the ``TEST.*`` keys of the runners, as far as it shows without a model or data."""
    views, window, ensemble, voting = cfg.TEST.VIEWS, cfg.TEST.WINDOW, cfg.TEST.ENSEMBLE, cfg.TEST.VOTING
    checks: list[Callable[[], object]] = [
        lambda: make_views(views.SCALES, views.FLIP),
        lambda: check_merge(views.NORMALIZE, views.MEAN, "TEST.VIEWS"),
        lambda: check_merge(ensemble.NORMALIZE, ensemble.MEAN, "TEST.ENSEMBLE"),
        lambda: WindowRunner(None, list(window.SIZE), list(window.STRIDE)) if window.SIZE else None,
    ]
    for check in checks:
        try:
            check()
        except ValueError as error:
            yield str(error)
    if views.PARITY not in PARITIES:
        yield f"TEST.VIEWS.PARITY {views.PARITY!r}: expected one of {', '.join(map(repr, PARITIES))}"
    if voting.MASKS not in PROVIDERS:
        yield f"TEST.VOTING.MASKS {voting.MASKS!r}: expected one of {', '.join(map(repr, PROVIDERS))}"
    if not 0 <= voting.MIN_MAJORITY <= 1:
        yield f"TEST.VOTING.MIN_MAJORITY {voting.MIN_MAJORITY}: expected a share in 0..1"
    if not 0 <= cfg.TEST.BOUNDARY_RATIO <= 1:
        yield f"TEST.BOUNDARY_RATIO {cfg.TEST.BOUNDARY_RATIO}: expected a share of the diagonal in 0..1 (paper: 0.02)"


def is_ensemble(cfg: CfgNode) -> bool:
    """Whether a config has members beside its own model."""
    return bool(cfg.TEST.ENSEMBLE.CONFIGS or cfg.TEST.ENSEMBLE.SCORES)


def build_pipeline(
    cfg: CfgNode, model: nn.Module | None = None, class_names: Sequence[str] | None = None, trust_pickle: bool = False
) -> Pipeline:
    """The runners of a config around a model.

    Args:
        cfg: keys ``TEST.*`` and ``INPUT.TEST``.
        model: the config's segmentor; None builds it and reads ``MODEL.WEIGHTS`` (if it takes part).
        class_names: K names; None takes those of the config's data sets.
        trust_pickle: of ``the_mask.engine.load_weights``.

    Raises:
        ValueError: keys that make no sense, or members of different classes.
        FileNotFoundError: a config, weights file or folder of scores is missing.
    """
    class_names = class_names if class_names is not None else config_classes(cfg)
    if is_ensemble(cfg):
        scorer: Any = build_ensemble(cfg, model, class_names, trust_pickle)
    else:
        scorer = build_scorer(cfg, model, trust_pickle)
    writer = None
    if cfg.TEST.SAVE_SCORES:
        if class_names is None:
            raise ValueError("TEST.SAVE_SCORES writes the names of the classes, but no data set gives them")
        writer = ScoreWriter(cfg.TEST.SAVE_SCORES, class_names)
    return Pipeline(scorer, build_finish(cfg, trust_pickle), writer)


def must_stream(cfg: CfgNode) -> bool:
    """Whether videos are fed frame by frame: asked for, or needed by members or stages with memories of their own."""
    return bool(cfg.TEST.STREAMING or is_ensemble(cfg) or cfg.TEST.STAGES.COUNT)


def build_scorer(cfg: CfgNode, model: nn.Module | None = None, trust_pickle: bool = False) -> ViewRunner | StageRunner:
    """Stages around views around windows around a config's segmentor, with output "scores"."""
    plain: Any = StreamingSegmentor(cfg, trust_pickle=trust_pickle).model if model is None else model
    segmentor = plain
    window = cfg.TEST.WINDOW
    if window.SIZE:
        segmentor = WindowRunner(segmentor, list(window.SIZE), list(window.STRIDE), window.PAD)
    elif window.STRIDE:
        raise ValueError(f"TEST.WINDOW.STRIDE {list(window.STRIDE)} without TEST.WINDOW.SIZE")
    views = ViewRunner.from_config(cfg, segmentor, output="scores")
    return StageRunner.from_config(cfg, views, plain) if cfg.TEST.STAGES.COUNT else views


def build_ensemble(
    cfg: CfgNode, model: nn.Module | None, class_names: Sequence[str] | None, trust_pickle: bool = False
) -> EnsembleRunner:
    """The members of ``TEST.ENSEMBLE``: the config's own model, further configs, folders of scores."""
    node = cfg.TEST.ENSEMBLE
    if len(node.CONFIGS) != len(node.CHECKPOINTS):
        raise ValueError(
            f"TEST.ENSEMBLE has {len(node.CONFIGS)} CONFIGS and {len(node.CHECKPOINTS)} CHECKPOINTS; expected one each"
        )
    own = 0 if node.WITHOUT_SELF else 1
    count = own + len(node.CONFIGS) + len(node.SCORES)
    weights = _per_member(node.WEIGHTS, "WEIGHTS", count)
    temperatures = _per_member(node.TEMPERATURES, "TEMPERATURES", count)
    streams: list[tuple[Any, str, Sequence[str] | None]] = []
    if own:
        streams.append((build_scorer(cfg, model, trust_pickle), "the config's own model", class_names))
    for file, checkpoint in zip(node.CONFIGS, node.CHECKPOINTS, strict=True):
        member = load_config(file, ["MODEL.WEIGHTS", str(checkpoint), "MODEL.DEVICE", cfg.MODEL.DEVICE])
        streams.append((build_scorer(member, None, trust_pickle), f"{file} ({checkpoint})", config_classes(member)))
    for folder in node.SCORES:
        saved = SavedScores(folder)
        streams.append((saved, str(folder), saved.class_names))
    members = [
        Member(stream, name, classes, weight, temperature)
        for (stream, name, classes), weight, temperature in zip(streams, weights, temperatures, strict=True)
    ]
    return EnsembleRunner(members, node.NORMALIZE, node.MEAN, output="scores")


def build_finish(cfg: CfgNode, trust_pickle: bool = False) -> list[FinishStep]:
    """Refinement, then voting, as far as the config asks for them."""
    steps: list[FinishStep] = []
    if cfg.TEST.REFINER.WEIGHTS:
        steps.append(ClassRefinement.from_config(cfg, trained_refiner(cfg, trust_pickle)))
    voting = cfg.TEST.VOTING
    if voting.MASKS:
        classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        steps.append(MaskVoting(build_mask_generator(cfg), classes, voting.MIN_MAJORITY, voting.SOFT))
    return steps


def _per_member(values: Sequence[float], key: str, count: int) -> list[float]:
    if values and len(values) != count:
        raise ValueError(f"TEST.ENSEMBLE.{key} has {len(values)} numbers for {count} members (self, CONFIGS, SCORES)")
    return [float(value) for value in values] or [1.0] * count
