"""A student that learns from labels and from a frozen teacher; only the student is saved and runs afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from the_mask.config import load_config
from the_mask.config.keys.memory import DistillationOptions
from the_mask.data.clips import Clip
from the_mask.modeling.build import trained_model
from the_mask.modeling.pixel.clip_segmentor import ClipSegmentor
from the_mask.modeling.pixel.context.types import TrainBatch
from the_mask.modeling.pixel.distillation import (
    content_mask,
    missing_teacher,
    pair_distillation,
    pixel_distillation,
)
from the_mask.modeling.segmentor import Segmentor
from the_mask.modeling.stream import NO_HINTS, Hints, StreamState

NAME = "DistilledSegmentor"


@META_ARCH_REGISTRY.register()
class DistilledSegmentor(Segmentor):
    """Adds distillation losses against a teacher that sees the same crop; everything else is the student's.

    The state dict is the student's, with the student's names, so that a checkpoint fits the plain model. The teacher is
    not a submodule: it is built when losses are first computed, on the device of the student, in eval mode.
    """

    @configurable
    def __init__(
        self,
        *,
        student: ClipSegmentor,
        build_teacher: Callable[[], Segmentor],
        options: DistillationOptions = DistillationOptions(),
    ) -> None:
        """
        Args:
            student: the model that is trained.
            build_teacher: gives the teacher with its trained weights: a ``ClipSegmentor``, or without the pairwise term
                any segmentor.
            options: of the terms.
        """
        super().__init__(
            num_classes=student.num_classes,
            ignore_label=student.ignore_label,
            pixel_mean=student.pixel_mean.flatten().tolist() if student.pixel_mean.device.type != "meta" else (0,) * 3,
            pixel_std=student.pixel_std.flatten().tolist() if student.pixel_std.device.type != "meta" else (1,) * 3,
            size_divisibility=student.size_divisibility,
            frozen_eval=student.frozen_eval,
        )
        self.student = student
        self.build_teacher = build_teacher
        self.options = options
        # In a list, which hides it from parameters(), state_dict() and train().
        self._teachers: list[Segmentor] = []

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            "student": _build_student(cfg),
            "build_teacher": lambda: build_teacher(cfg),
            "options": DistillationOptions.from_config(cfg),
        }

    @property
    def teacher(self) -> Segmentor:
        """The teacher, built at its first use.

        Raises:
            ValueError, FileNotFoundError: no teacher, or one with other classes or another padding than the student.
        """
        if not self._teachers:
            # Building the teacher must not change the student's training, not even through random numbers.
            with torch.random.fork_rng(devices=[]):
                teacher = self.build_teacher()
            if teacher.num_classes != self.num_classes or teacher.size_divisibility != self.size_divisibility:
                raise ValueError(
                    f"the teacher has {teacher.num_classes} classes and pads to multiples of "
                    f"{teacher.size_divisibility}, the student {self.num_classes} and {self.size_divisibility}: they "
                    "must agree"
                )
            self._teachers.append(teacher.to(self.device).eval().requires_grad_(False))
        return self._teachers[0]

    @property
    def score_stride(self) -> int:
        """That of the student."""
        return self.student.score_stride

    @property
    def looks_back(self) -> bool:
        """That of the student."""
        return self.student.looks_back

    @property
    def reads_prior(self) -> bool:
        """That of the student."""
        return self.student.reads_prior

    def losses(self, clips: list[Clip]) -> dict[str, Tensor]:  # type: ignore[override]
        """The student's losses, ``loss_distill_pixel`` and ``loss_distill_pair``."""
        student = self.student
        batch = student.training_batch(clips)
        prior = student.prior_provider.for_training(student, batch) if student.sem_seg_head.uses_prior else None
        features, output = student.clip_output(batch, prior)
        losses = student.output_losses(batch, features, output)
        with torch.no_grad():
            lessons, answer = self._lesson(clips)
        if self.options.pixel_weight:
            valid = self._content(batch, (output.logits.shape[-2], output.logits.shape[-1]))
            term = pixel_distillation(output.logits, answer, self.options.temperature, valid)
            losses["loss_distill_pixel"] = self.options.pixel_weight * term
        if self.options.pair_weight:
            own = self._level({**features, **output.features}, "student")
            wanted = self._level(lessons, "teacher")
            losses["loss_distill_pair"] = self.options.pair_weight * pair_distillation(
                own, wanted, self.options.pair_scale
            )
        return losses

    def _lesson(self, clips: Sequence[Clip]) -> tuple[Mapping[str, Tensor], Tensor]:
        """The teacher's features by level (none of another family than the student's) and logits [B, K, h, w]."""
        teacher = self.teacher
        if isinstance(teacher, ClipSegmentor):
            features, output = teacher.clip_output(teacher.training_batch(clips))
            return {**features, **output.features}, output.logits
        images, frames = teacher.stack(clips)
        scores = torch.stack([clip[-1] for clip in teacher.group_scores(images, frames)])
        scores = teacher.crop_scores(scores, images.shape[-2], images.shape[-1])
        # Scores that are sums over masks do not add up to one.
        smallest = 1e-6
        return {}, (scores / scores.sum(dim=1, keepdim=True).clamp(min=smallest)).clamp(min=smallest).log()

    def _content(self, batch: TrainBatch, size: tuple[int, int]) -> Tensor:
        contents = [clip.padding or clip.frame_size for clip in batch.clips]
        return content_mask(contents, (batch.images.shape[-2], batch.images.shape[-1]), size, batch.images.device)

    def _level(self, found: Mapping[str, Tensor], who: str) -> Tensor:
        if self.options.pair_level not in found:
            raise ValueError(
                f"MODEL.DISTILLATION.PAIR_LEVEL {self.options.pair_level!r}: the {who} has {', '.join(sorted(found))}"
            )
        return found[self.options.pair_level]

    # Everything else is the student's.

    def set_iteration(self, iteration: int) -> None:
        """See :class:`Segmentor`."""
        super().set_iteration(iteration)
        self.student.set_iteration(iteration)

    def after_step(self) -> None:
        """See :class:`Segmentor`."""
        self.student.after_step()

    def group_scores(self, images: Tensor, num_frames: int) -> Iterable[Tensor]:
        """See :class:`Segmentor`."""
        return self.student.group_scores(images, num_frames)

    def init_state(self) -> StreamState:
        """See :class:`Segmentor`."""
        return self.student.init_state()

    def runtime_parts(self) -> list[tuple[nn.Module, str]]:
        """The parts of the student."""
        return self.student.runtime_parts()

    def step(self, frame: Tensor, state: StreamState, hints: Hints = NO_HINTS) -> tuple[Tensor, StreamState]:
        """See :class:`ClipSegmentor`."""
        return self.student.step(frame, state, hints)

    def check_state(self, state: StreamState) -> None:
        """See :class:`Stream`."""
        self.student.check_state(state)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """The student's state dict, with its own names."""
        return self.student.state_dict(*args, **options)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the student's weights."""
        return self.student.load_state_dict(state_dict, strict, assign)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> DistilledSegmentor:
        for teacher in self._teachers:
            teacher._apply(function)
        return super()._apply(function, recurse)


def _build_student(cfg: CfgNode) -> ClipSegmentor:
    name = cfg.MODEL.DISTILLATION.STUDENT_ARCHITECTURE
    cls = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    if cls is None or not issubclass(cls, ClipSegmentor):
        raise ValueError(f"MODEL.DISTILLATION.STUDENT_ARCHITECTURE {name!r}: expected ClipSegmentor or a kind of it")
    return cls(cfg)


def build_teacher(cfg: CfgNode) -> Segmentor:
    """Build the teacher of ``MODEL.DISTILLATION`` with its weights, on the CPU.

    Raises:
        ValueError: no config or weights, weights that do not fit, a teacher with other classes than ``DATASETS.TRAIN``,
            or the pairwise term with a teacher that is not a ``ClipSegmentor``.
        FileNotFoundError: a file does not exist.
    """
    options = cfg.MODEL.DISTILLATION
    for problem in missing_teacher(options):
        raise ValueError(problem)
    teacher_cfg = load_config(options.TEACHER_CONFIG, [str(value) for value in options.TEACHER_OPTIONS])
    teacher_cfg.MODEL.DEVICE = "cpu"
    model = trained_model(teacher_cfg, weights=options.TEACHER_WEIGHTS, datasets=cfg.DATASETS.TRAIN)
    assert isinstance(model, Segmentor)
    if options.PAIR_WEIGHT and not isinstance(model, ClipSegmentor):
        raise ValueError(
            f"MODEL.DISTILLATION.TEACHER_CONFIG {options.TEACHER_CONFIG} builds a {type(model).__name__}: the pairwise "
            "term compares features of ClipSegmentors; set MODEL.DISTILLATION.PAIR_WEIGHT 0"
        )
    return model
