"""Matching targets from the label maps of a clip, one target per class seen in the clip.

Axes: B clips, T frames, N targets, H W full size. Targets stay label maps ("bits read on demand"): one small integer
per pixel whatever N is. A float mask exists for one target and one frame at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from the_mask.data.clips import Clip


@dataclass(frozen=True)
class ClipTargets:
    """Targets of one clip.

    Attributes:
        labels: int64 [N] on the CPU, the sorted classes of the clip's labelled frames without the ignored one.
        index_map: uint8 (int16 when N > 254) [T, H, W]: position in ``labels`` of each pixel's class; N where the pixel
            is ignored, padding, or in an unlabelled frame.
        labelled: per frame, whether it has labels.
        has_valid: per frame, whether some pixel is not ignored.
        has_ignored: per frame, whether some pixel is ignored.
        present: per frame, whether each target has a pixel there: T tuples of N.
        name: the clip, for messages.
    """

    labels: Tensor
    index_map: Tensor
    labelled: tuple[bool, ...]
    has_valid: tuple[bool, ...]
    has_ignored: tuple[bool, ...]
    present: tuple[tuple[bool, ...], ...]
    name: str = ""

    @property
    def num_targets(self) -> int:
        """Number of targets, N."""
        return int(self.labels.shape[0])

    def mask(self, target: int, frame: int) -> Tensor:
        """Bool [H, W] of one target in one frame; ``target = N`` gives the ignored pixels."""
        return self.index_map[frame] == target

    def masks(self) -> Tensor:
        """Bool [N, T, H, W] of all targets (for inspection and tests; the losses never build it)."""
        steps = torch.arange(self.num_targets, device=self.index_map.device)
        return self.index_map[None] == steps[:, None, None, None]

    def valid(self) -> Tensor:
        """Bool [T, H, W]: pixels that are not ignored, padding, or in an unlabelled frame."""
        return self.index_map != self.num_targets

    def supervised_frames(self, valid_mask: bool) -> list[int]:
        """Frames that take part in costs and losses.

        With ``valid_mask``, a frame of only ignored pixels is left out, like an unlabelled one; without it, as in the
        released code, such a frame is background everywhere.
        """
        return [t for t, labelled in enumerate(self.labelled) if labelled and (self.has_valid[t] or not valid_mask)]


def clip_targets(
    label_maps: Sequence[Tensor | None],
    ignore_label: int,
    num_classes: int | None = None,
    size: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    name: str = "",
) -> ClipTargets:
    """Targets of one clip from the label maps of its frames.

    Args:
        label_maps: T int64 maps [H, W] of classes 0..K-1 or ``ignore_label``; None for an unlabelled frame.
        ignore_label: class id that is no target.
        num_classes: K, to check the labels against; None takes any id.
        size: (H, W) of the network input; label maps are padded with ignore at the bottom and right up to it. Default:
            the size of the label maps.
        device: where ``index_map`` is put. Everything else stays on the CPU: the number of targets is data-dependent,
            and asking a device for it would stall it.
        name: the clip, for messages.

    Raises:
        ValueError: no frame; label maps of several sizes or larger than ``size``; all frames unlabelled and no
            ``size``; a label outside 0..K-1 that is not ``ignore_label``.
    """
    if not label_maps:
        raise ValueError(f"clip {name!r} has no frames")
    maps = [None if m is None else m.detach().to("cpu", torch.int64) for m in label_maps]
    shapes = {tuple(m.shape) for m in maps if m is not None}
    if len(shapes) > 1:
        raise ValueError(f"clip {name!r}: the frames' label maps differ in size: {sorted(shapes)}")
    if size is None:
        if not shapes:
            raise ValueError(f"clip {name!r}: no frame has labels, so the size of the network input must be given")
        size = next(iter(shapes))  # type: ignore[assignment]
    assert size is not None
    height, width = size
    if shapes and (next(iter(shapes))[0] > height or next(iter(shapes))[1] > width):
        raise ValueError(f"clip {name!r}: label maps of {next(iter(shapes))} do not fit the network input {size}")

    counts = [None if m is None else _count_labels(m, ignore_label, num_classes, name) for m in maps]
    length = max((len(c) for c in counts if c is not None), default=0)
    seen = torch.zeros(max(length, ignore_label + 1), dtype=torch.bool)
    for count in counts:
        if count is not None:
            seen[: len(count)] |= count > 0
    seen[ignore_label] = False
    labels = seen.nonzero().flatten()
    ignored = len(labels)
    dtype = torch.uint8 if ignored <= 254 else torch.int16
    table = torch.full((len(seen),), ignored, dtype=dtype)
    table[labels] = torch.arange(ignored).to(dtype)

    index_map = torch.full((len(maps), height, width), ignored, dtype=dtype)
    has_valid, has_ignored = [], []
    for t, (label_map, count) in enumerate(zip(maps, counts, strict=True)):
        num_valid = 0
        if label_map is not None and count is not None:
            h, w = label_map.shape
            index_map[t, :h, :w] = table[label_map]
            num_valid = h * w - (int(count[ignore_label]) if len(count) > ignore_label else 0)
        has_valid.append(num_valid > 0)
        has_ignored.append(num_valid < height * width)
    return ClipTargets(
        labels=labels,
        index_map=index_map.to(device) if device is not None else index_map,
        labelled=tuple(m is not None for m in maps),
        has_valid=tuple(has_valid),
        has_ignored=tuple(has_ignored),
        present=tuple(
            tuple(count is not None and i < len(count) and bool(count[i]) for i in labels.tolist()) for count in counts
        ),
        name=name,
    )


def _count_labels(label_map: Tensor, ignore_label: int, num_classes: int | None, name: str) -> Tensor:
    """Pixels per label id. Raises a ValueError for ids that are neither a class nor ignored."""
    low = int(label_map.min()) if label_map.numel() else 0
    if low < 0:
        raise ValueError(f"clip {name!r}: label {low} is negative; labels are 0..K-1 or {ignore_label} (ignore)")
    count = torch.bincount(label_map.flatten())
    if num_classes is not None:
        bad = [i for i in count.nonzero().flatten().tolist() if i >= num_classes and i != ignore_label]
        if bad:
            raise ValueError(
                f"clip {name!r}: labels {bad} are outside 0..{num_classes - 1} and are not {ignore_label} (ignore); "
                "check the data set with `the-mask check`"
            )
    return count


def build_targets(
    clips: Sequence[Clip],
    ignore_label: int,
    num_classes: int | None = None,
    size: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
) -> list[ClipTargets]:
    """`clip_targets` of a batch of clips (mapper output), all of one size.

    Args:
        clips: dicts with ``labels``; ``dataset``, ``video_id`` and ``frame_ids`` name the clip in messages.
        ignore_label, num_classes, device: as in `clip_targets`.
        size: (H, W) of the network input; default: the largest frame of the batch.
    """
    if size is None:
        sizes = [tuple(m.shape) for clip in clips for m in clip.labels if m is not None]
        sizes += [tuple(f.shape[-2:]) for clip in clips for f in clip.frames]
        if sizes:
            size = (max(s[0] for s in sizes), max(s[1] for s in sizes))
    return [clip_targets(clip.labels, ignore_label, num_classes, size, device, clip.name) for clip in clips]


def cell_counts(
    index_map: Tensor, num_values: int, size: tuple[int, int] | torch.Size, points: Tensor | None = None
) -> Tensor:
    """Number of pixels of each value in each cell of a coarser map, when that map is enlarged by nearest neighbour.

    A loss on nearest-enlarged logits sees each logit once per pixel of its cell, so these counts give it exactly, at
    the coarse size.

    Args:
        index_map: [H, W] integers in 0..num_values-1.
        num_values: V.
        size: (h, w) of the coarser map.
        points: [P, 2], (x, y) in 0..1; count only the pixels under these, with repetition. None: every pixel once.

    Returns:
        float32 [V, h * w].
    """
    h, w = size
    height, width = index_map.shape
    device = index_map.device
    # Enlarging the cell numbers themselves gives exactly the rule of F.interpolate.
    rows = torch.arange(h, device=device, dtype=torch.float32).view(1, 1, h)
    columns = torch.arange(w, device=device, dtype=torch.float32).view(1, 1, w)
    row = F.interpolate(rows, size=height, mode="nearest")[0, 0].long()
    column = F.interpolate(columns, size=width, mode="nearest")[0, 0].long()
    key = (row[:, None] * w + column) * num_values + index_map
    if points is not None:
        x = (points[:, 0] * width).long().clamp_(max=width - 1)
        y = (points[:, 1] * height).long().clamp_(max=height - 1)
        key = key[y, x]
    return torch.bincount(key.flatten(), minlength=h * w * num_values).view(h * w, num_values).t().float()
