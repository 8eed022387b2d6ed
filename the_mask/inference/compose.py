"""Builds the stream of a config: window -> views -> stages -> ensemble -> post-processing, outermost last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from torch import Tensor, nn

from the_mask.config import load_config
from the_mask.config.keys.inference import RefinementOptions
from the_mask.data.class_names import config_classes
from the_mask.data.clips import Clip
from the_mask.data.io import read_image
from the_mask.inference.class_refine import ClassRefinement
from the_mask.inference.ensemble import Ensemble, Member
from the_mask.inference.mask_generators import PROVIDERS, build_mask_generator
from the_mask.inference.merge import PARITIES, check_merge, score_labels
from the_mask.inference.saved_scores import SavedScores, ScoreWriter
from the_mask.inference.stages import MultiStage
from the_mask.inference.stream import StreamingSegmentor
from the_mask.inference.views import MultiView, make_views
from the_mask.inference.voting import MaskVoting
from the_mask.inference.window import SlidingWindow, check_window
from the_mask.modeling.stream import NO_HINTS, FrameName, Hints, Stream, StreamState
from the_mask.weights.trained import trained_refiner

# (frame uint8 [H, W, 3], labels [H, W], scores [K, H, W], name) -> labels [H, W]; labels are on the CPU.
LabelStep = Callable[[np.ndarray, Tensor, Tensor, FrameName | None], Tensor]


class PostProcess(Stream):
    """Turns a stream's scores into labels, after refinement and voting; optionally saves the scores.

    Its states are those of the stream. It can predict test clips if the stream can.

    Args:
        stream: with output "scores".
        steps: post-processing steps on labels, in order.
        writer: saves the scores before the steps; None saves nothing.
    """

    def __init__(self, stream: Stream, steps: Sequence[LabelStep] = (), writer: ScoreWriter | None = None) -> None:
        self.stream = stream
        self.num_classes = stream.num_classes
        self.steps = list(steps)
        self.writer = writer

    @property
    def looks_back(self) -> bool:
        """That of the wrapped stream."""
        return self.stream.looks_back

    @property
    def keyframe_interval(self) -> int:
        """That of the wrapped stream."""
        return self.stream.keyframe_interval

    def is_keyframe(self, state: StreamState) -> bool | None:
        """The stream's answer."""
        return self.stream.is_keyframe(state)

    def init_state(self) -> StreamState:
        """That of the wrapped stream."""
        return self.stream.init_state()

    def step(
        self, frame: np.ndarray | Tensor, state: StreamState, hints: Hints = NO_HINTS
    ) -> tuple[Tensor, StreamState]:
        """Labels [H, W] of the next frame, uint8 RGB [H, W, 3]. Files are named after the frame."""
        scores, state = self.stream.step(frame, state, hints)
        return self._finish(lambda: np.asarray(frame), scores, hints.name), state

    def predict(self, clips: Sequence[Clip]) -> list[list[Tensor]]:
        """Label maps [height, width] of the frames of test clips."""
        assert isinstance(self.stream, MultiView), "must_stream() tells what predicts no clips"
        return [
            [
                self._finish(lambda file=file: read_image(file), scores, (clip.video_id, frame_id))  # type: ignore[misc]
                for scores, frame_id, file in zip(
                    self.stream.clip_scores(clip), clip.frame_ids, clip.file_names, strict=True
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
        picture = image() if self.steps else None
        for step in self.steps:
            assert picture is not None
            labels = step(picture, labels, scores, name)
        return labels


def is_plain(cfg: CfgNode) -> bool:
    """Whether a config uses its model alone, without anything around it."""
    test = cfg.TEST
    views = test.VIEWS
    return not (
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
    """Problems of the ``TEST.*`` keys for streams that can be found without a model or data."""
    views, window, ensemble, voting = cfg.TEST.VIEWS, cfg.TEST.WINDOW, cfg.TEST.ENSEMBLE, cfg.TEST.VOTING
    checks: list[Callable[[], object]] = [
        lambda: make_views(views.SCALES, views.FLIP),
        lambda: check_merge(views.NORMALIZE, views.MEAN, "TEST.VIEWS"),
        lambda: check_merge(ensemble.NORMALIZE, ensemble.MEAN, "TEST.ENSEMBLE"),
        lambda: check_window(window.SIZE, window.STRIDE or window.SIZE) if window.SIZE else None,
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
    """Whether a config has ensemble members besides its own model."""
    return bool(cfg.TEST.ENSEMBLE.CONFIGS or cfg.TEST.ENSEMBLE.SCORES)


def build_stream(
    cfg: CfgNode, model: nn.Module | None = None, class_names: Sequence[str] | None = None, trust_pickle: bool = False
) -> MultiView | PostProcess:
    """Build the stream of label maps of a config; it can also predict test clips, unless :func:`must_stream`.

    Args:
        cfg: keys ``TEST.*`` and ``INPUT.TEST``.
        model: the config's segmentor; None builds it and reads ``MODEL.WEIGHTS`` (if it is used).
        class_names: K names; None takes those of the config's data sets.
        trust_pickle: of ``the_mask.engine.load_weights``.

    Raises:
        ValueError: keys out of range or in conflict, or members with different classes.
        FileNotFoundError: a config, weights file or folder of scores is missing.
    """
    class_names = class_names if class_names is not None else config_classes(cfg)
    writer, steps = None, build_steps(cfg, trust_pickle)
    if cfg.TEST.SAVE_SCORES:
        if class_names is None:
            raise ValueError("TEST.SAVE_SCORES writes the names of the classes, but no data set gives them")
        writer = ScoreWriter(cfg.TEST.SAVE_SCORES, class_names)
    if is_ensemble(cfg):
        return PostProcess(build_ensemble(cfg, model, class_names, trust_pickle), steps, writer)
    if cfg.TEST.STAGES.COUNT or steps or writer is not None:
        return PostProcess(build_score_stream(cfg, model, trust_pickle), steps, writer)
    return _build_views(cfg, model, trust_pickle, "labels")


def must_stream(cfg: CfgNode) -> bool:
    """Whether videos must be processed frame by frame: by config, or because members or stages have memories."""
    return bool(cfg.TEST.STREAMING or is_ensemble(cfg) or cfg.TEST.STAGES.COUNT)


def build_score_stream(
    cfg: CfgNode, model: nn.Module | None = None, trust_pickle: bool = False
) -> MultiView | MultiStage:
    """A config's segmentor, wrapped in windows, views and stages as configured, with output "scores"."""
    views = _build_views(cfg, model, trust_pickle, "scores")
    return MultiStage.from_config(cfg, views) if cfg.TEST.STAGES.COUNT else views


def _build_views(cfg: CfgNode, model: nn.Module | None, trust_pickle: bool, output: str) -> MultiView:
    segmentor: Any = StreamingSegmentor(cfg, trust_pickle=trust_pickle).model if model is None else model
    window = cfg.TEST.WINDOW
    if window.SIZE:
        segmentor = SlidingWindow(segmentor, list(window.SIZE), list(window.STRIDE), window.PAD)
    elif window.STRIDE:
        raise ValueError(f"TEST.WINDOW.STRIDE {list(window.STRIDE)} without TEST.WINDOW.SIZE")
    return MultiView.from_config(cfg, segmentor, output)


def build_ensemble(
    cfg: CfgNode, model: nn.Module | None, class_names: Sequence[str] | None, trust_pickle: bool = False
) -> Ensemble:
    """The ensemble of ``TEST.ENSEMBLE``: the config's own model, further configs, folders of scores."""
    node = cfg.TEST.ENSEMBLE
    if len(node.CONFIGS) != len(node.CHECKPOINTS):
        raise ValueError(
            f"TEST.ENSEMBLE has {len(node.CONFIGS)} CONFIGS and {len(node.CHECKPOINTS)} CHECKPOINTS; expected one each"
        )
    own = 0 if node.WITHOUT_SELF else 1
    count = own + len(node.CONFIGS) + len(node.SCORES)
    weights = _per_member(node.WEIGHTS, "WEIGHTS", count)
    temperatures = _per_member(node.TEMPERATURES, "TEMPERATURES", count)
    streams: list[tuple[Stream, str, Sequence[str] | None]] = []
    if own:
        streams.append((build_score_stream(cfg, model, trust_pickle), "the config's own model", class_names))
    for file, checkpoint in zip(node.CONFIGS, node.CHECKPOINTS, strict=True):
        member = load_config(file, ["MODEL.WEIGHTS", str(checkpoint), "MODEL.DEVICE", cfg.MODEL.DEVICE])
        stream = build_score_stream(member, None, trust_pickle)
        streams.append((stream, f"{file} ({checkpoint})", config_classes(member)))
    for folder in node.SCORES:
        saved = SavedScores(folder)
        streams.append((saved, str(folder), saved.class_names))
    members = [
        Member(stream, name, classes, weight, temperature)
        for (stream, name, classes), weight, temperature in zip(streams, weights, temperatures, strict=True)
    ]
    return Ensemble(members, node.NORMALIZE, node.MEAN)


def build_steps(cfg: CfgNode, trust_pickle: bool = False) -> list[LabelStep]:
    """The post-processing steps of a config: refinement, then voting."""
    steps: list[LabelStep] = []
    if cfg.TEST.REFINER.WEIGHTS:
        steps.append(ClassRefinement(trained_refiner(cfg, trust_pickle), RefinementOptions.from_config(cfg)))
    voting = cfg.TEST.VOTING
    if voting.MASKS:
        classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        steps.append(MaskVoting(build_mask_generator(cfg), classes, voting.MIN_MAJORITY, voting.SOFT))
    return steps


def _per_member(values: Sequence[float], key: str, count: int) -> list[float]:
    if values and len(values) != count:
        raise ValueError(f"TEST.ENSEMBLE.{key} has {len(values)} numbers for {count} members (self, CONFIGS, SCORES)")
    return [float(value) for value in values] or [1.0] * count
