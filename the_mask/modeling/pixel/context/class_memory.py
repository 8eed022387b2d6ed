"""Class memory: running means of the pixel features of each class over the whole data set.

"Memory Based Video Scene Parsing" (after MCIBI). :mod:`the_mask.modeling.pixel.context.class_rows` has the update of
its rows.

Axes: B frames, K classes, n prototypes per class, C channels, H W size of labels, h w size of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from the_mask.config.keys.memory import INITS, RESOLUTIONS
from the_mask.data.tensor_files import read_tensors, state_dict_of
from the_mask.modeling.pixel.context.class_rows import (
    Candidates,
    ClassSums,
    MomentumSchedule,
    draw_candidates,
    frame_sums,
    start_rows,
    updated_memory,
)
from the_mask.modeling.pixel.context.prior_map import PriorMap


def read_rows(memory: Tensor, seen: Tensor, prior: PriorMap) -> Tensor:
    """Rows of the memory for a prior: M[label] for labels, sum over k of P_k M_k for probabilities.

    Classes that were never seen, and unknown pixels of the prior, give 0.

    Args:
        memory: [K, n, C].
        seen: bool [K].
        prior: of B maps [h, w] with K classes.

    Returns:
        [B, n, C, h, w] of the memory's dtype.
    """
    rows = memory * seen[:, None, None]
    if prior.labels is not None:
        known = prior.labels != prior.ignore_label
        values = rows[prior.labels.where(known, 0)] * known[..., None, None]
        return values.permute(0, 3, 4, 1, 2)
    assert prior.probabilities is not None
    return torch.einsum("bkhw,knc->bnchw", prior.probabilities.to(rows), rows)


class ClassMemory(nn.Module):
    """Rows [K, n, C] that follow the features seen in training; buffers, not parameters.

    One iteration: any number of :meth:`read` and :meth:`collect`, all with the rows of the iteration before, then one
    :meth:`update`, which is collective and leaves all processes with the same rows.

    Args:
        num_classes: K.
        channels: C.
        prototypes: n.
        init: what a class starts from: ``first_seen_mean`` the mean feature, ``random_pixel`` (paper) one random pixel,
            both of the first iteration that has the class; ``file`` rows made before, for instance by k-means.
        init_file: for ``file``: ``.pth`` or ``.safetensors`` with one tensor [K, C] or [K, n, C]; rows that are all 0
            count as never seen.
        update_at: ``labels`` upsamples features to the labels (paper), ``features`` takes the labels at the features.
        momentum: schedule of m.
    """

    rows: Tensor
    seen: Tensor

    def __init__(
        self,
        num_classes: int,
        channels: int,
        prototypes: int = 1,
        init: str = "first_seen_mean",
        init_file: str = "",
        update_at: str = "labels",
        momentum: MomentumSchedule | None = None,
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(f"class memory: INIT {init!r}: expected one of {', '.join(INITS)}")
        if update_at not in RESOLUTIONS:
            raise ValueError(f"class memory: UPDATE_RES {update_at!r}: expected one of {', '.join(RESOLUTIONS)}")
        if min(num_classes, channels, prototypes) < 1:
            raise ValueError(f"class memory: needs classes, channels and PROTOTYPES >= 1, got {prototypes} prototypes")
        if bool(init_file) != (init == "file"):
            raise ValueError(f"class memory: INIT {init!r} with INIT_FILE {init_file!r}: file needs one, others none")
        self.init = init
        self.update_at = update_at
        self.momentum = momentum or MomentumSchedule()
        rows = torch.zeros(num_classes, prototypes, channels)
        if init == "file" and rows.device.type != "meta":
            rows = read_memory_file(init_file, num_classes, prototypes, channels)
        self.register_buffer("rows", rows)
        self.register_buffer("seen", rows.abs().amax(dim=(1, 2)) > 0)
        self.reset()

    def reset(self) -> None:
        """Discard what :meth:`collect` has gathered since the last update."""
        self._sums: ClassSums | None = None
        self._candidates: Candidates | None = None

    def read(self, prior: PriorMap) -> Tensor:
        """See :func:`read_rows`; detached, [B, n, C, h, w]."""
        return read_rows(self.rows.detach(), self.seen, prior)

    @torch.no_grad()
    def collect(self, features: Tensor, labels: Tensor, seeds: Sequence[int]) -> None:
        """Collect the pixels of a batch for the next update.

        Args:
            features: [B, C, h, w].
            labels: int64 [B, H, W] of the same field of view; values outside 0..K-1 are not counted.
            seeds: of the B clips, for ``random_pixel``.
        """
        with torch.autocast(features.device.type, enabled=False):
            for frame, label, seed in zip(features.detach(), labels, seeds, strict=True):
                sums = frame_sums(frame.float(), label, self.rows, self.seen, self.update_at == "labels")
                self._sums = sums if self._sums is None else self._sums + sums
                if self.init == "random_pixel" and not bool(self.seen.all()):
                    drawn = draw_candidates(frame, label, self.rows, self.seen, seed)
                    held = self._candidates or Candidates.none(self.rows)
                    self._candidates = held.best_with([drawn])

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Update the rows with the pixels collected in all processes since the last update; a collective call."""
        sums = (self._sums or ClassSums.zeros(self.rows)).over_ranks()
        memory, seen = updated_memory(self.rows, self.seen, sums, momentum)
        # All processes have the same rows, so either all of them get here or none.
        if self.init == "random_pixel" and not bool(self.seen.all()):
            found = (self._candidates or Candidates.none(self.rows)).over_ranks()
            first, seen = start_rows(self.rows, self.seen, found)
            memory = torch.where(self.seen[:, None, None], memory, first)
        self.rows.copy_(memory)
        self.seen.copy_(seen)
        self.reset()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rows = state_dict.get(f"{prefix}rows")
        if isinstance(rows, Tensor) and rows.shape != self.rows.shape:
            names = "[classes, prototypes, channels]"
            raise ValueError(
                f"the checkpoint's class memory {prefix}rows is {list(rows.shape)}, the model's "
                f"{list(self.rows.shape)} {names}: it was trained on other classes or with other settings; set "
                "MODEL.SEM_SEG_HEAD.NUM_CLASSES and the block's keys to the checkpoint's, or load it as MODEL.WEIGHTS "
                "of a training, which starts the memory anew"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def read_memory_file(path: str | Path, num_classes: int, prototypes: int, channels: int) -> Tensor:
    """Rows [K, n, C] float32 from a file with one tensor [K, C] (n = 1) or [K, n, C].

    Raises:
        FileNotFoundError, ValueError: no such file, not one tensor, or one of another shape; the file is named.
    """
    content = read_tensors(path, "file of a class memory (INIT_FILE)")
    tensors = [content] if isinstance(content, Tensor) else list(state_dict_of(content, path).values())
    if len(tensors) != 1:
        raise ValueError(f"class memory: INIT_FILE {path} must hold one tensor [classes, (prototypes,) channels]")
    rows = tensors[0].float()
    rows = rows[:, None] if rows.dim() == 2 else rows
    expected = (num_classes, prototypes, channels)
    if tuple(rows.shape) != expected or not torch.isfinite(rows).all():
        raise ValueError(
            f"class memory: INIT_FILE {path} holds {list(tensors[0].shape)}, expected finite values {list(expected)} "
            "(classes, prototypes, channels)"
        )
    return rows
