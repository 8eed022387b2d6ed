"""The clip, and which frames make one: training clips around a reference, and the tiling of a test video into clips.

All functions are pure and see a single video, so a clip never crosses videos. Frame indices count from 0 in time.
Axes: T frames of a clip, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor
from typing_extensions import Self

from the_mask.config.keys.input import BOUNDARIES

PER_FRAME = (
    "frames", "labels", "priors", "frame_ids", "file_names", "mask_file_names", "frame_indices", "timestamps",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of one video, oldest first, with their labels and names: the output of loaders and input of segmentors.

    Attributes per frame are tuples of T entries, or empty if they are unknown.

    Attributes:
        frames: [3, H, W], RGB 0..255; empty if only the ground truth was read.
        labels: maps [H, W] of train ids, None for a frame without a mask.
        priors: maps like the labels, of stored predictions (``INPUT.PRIOR_MASKS``).
        dataset, video_id: names.
        frame_ids, file_names, mask_file_names: names by frame; the last is None for a frame without a mask.
        frame_indices, timestamps: positions in the video, as a count of frames and in seconds.
        reference: position of the reference frame in the clip; None is the last one.
        padding: (H, W) of the content, before padding at the bottom and right; None if there is no padding.
        height, width: size of the original frames, to which results are resized; None: that of ``frames``.
        seed: seed of all random numbers of the clip, also in the losses.
        resampled: number of clips without labels that were drawn before this one.
        is_first, is_last: whether it is the first or last clip of its video.

    Raises:
        ValueError: attributes per frame that differ in length.
    """

    frames: Sequence[Tensor] = ()
    labels: Sequence[Any] = ()
    priors: Sequence[Tensor] = ()
    dataset: str = ""
    video_id: str = ""
    frame_ids: Sequence[str] = ()
    file_names: Sequence[str] = ()
    mask_file_names: Sequence[str | None] = ()
    frame_indices: Sequence[int] = ()
    timestamps: Sequence[float] = ()
    reference: int | None = None
    padding: tuple[int, int] | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    resampled: int = 0
    is_first: bool = False
    is_last: bool = False

    def __post_init__(self) -> None:
        for name in PER_FRAME:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        lengths = {name: len(getattr(self, name)) for name in PER_FRAME if getattr(self, name)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"clip {self.name!r}: attributes per frame differ in length: {lengths}")

    def __len__(self) -> int:
        """Number of frames."""
        return max(len(getattr(self, name)) for name in PER_FRAME)

    @property
    def name(self) -> str:
        """The clip as ``dataset/video frames a, b``, for messages."""
        video = "/".join(name for name in (self.dataset, self.video_id) if name)
        frames = ", ".join(self.frame_ids)
        return f"{video} frames {frames}" if frames else video

    @property
    def frame_size(self) -> tuple[int, int]:
        """(H, W) of the frames; a ValueError if they differ, or if there is none."""
        sizes = {tuple(frame.shape[-2:]) for frame in self.frames}
        if not sizes:
            raise ValueError(f"clip {self.name!r} has no frames")
        if len(sizes) > 1:
            raise ValueError(f"frames of clip {self.name!r} differ in size: {sorted(sizes)}")
        height, width = sizes.pop()
        return height, width

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the original frames."""
        if self.height is not None and self.width is not None:
            return self.height, self.width
        return self.frame_size

    def window(self, start: int, stop: int) -> Self:
        """The frames at positions ``start`` to ``stop`` - 1 of the clip; a reference outside is dropped.

        Raises:
            ValueError: no frame, or one that the clip does not have.
        """
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"clip {self.name!r} of {len(self)} frames has no frames {start} to {stop - 1}")
        reference = self.reference if self.reference is not None and start <= self.reference < stop else None
        cut: dict[str, Any] = {name: getattr(self, name)[start:stop] for name in PER_FRAME}
        return replace(self, **cut, reference=None if reference is None else reference - start)

    def lengthened(self, length: int) -> Self:
        """The clip with its oldest frame repeated in front, so that it has ``length`` frames."""
        missing = length - len(self)
        if missing <= 0:
            return self
        longer: dict[str, Any] = {
            name: (*getattr(self, name)[:1] * missing, *getattr(self, name)) for name in PER_FRAME
        }
        reference = None if self.reference is None else self.reference + missing
        return replace(self, **longer, reference=reference)


def as_clips(inputs: Iterable[Clip | Mapping[str, Any]]) -> list[Clip]:
    """Convert dicts, which Detectron2's models and loaders use, to clips; keys are the attributes of :class:`Clip`.

    Other keys of a dict are ignored.

    Raises:
        ValueError: a dict without attributes per frame, such as one of Detectron2's ``DatasetMapper``.
    """
    names = {field.name for field in fields(Clip)}
    clips = []
    for number, item in enumerate(inputs):
        if isinstance(item, Mapping):
            if not any(name in item for name in PER_FRAME):
                raise ValueError(
                    f"input {number} is no clip: it has the keys {sorted(item)}, but not `frames`, a list of images "
                    "[3, H, W]; use the loaders of the_mask.data, or its ClipMapper in your own loader"
                )
            item = Clip(**{key: value for key, value in item.items() if key in names})
        clips.append(item)
    return clips


def clip_offsets(dilations: Sequence[int]) -> list[int]:
    """Offsets of all frames of a clip from its reference, oldest first; the reference (0) is added unless listed.

    ``[-3]`` gives ``[-3, 0]``, ``[0]`` gives ``[0]``, ``[-4, -3, -2, -1]`` the four frames before and the reference.

    Raises:
        ValueError: empty list or repeated offset.
    """
    offsets = [int(d) for d in dilations]
    if not offsets or len(set(offsets)) != len(offsets):
        raise ValueError(f"dilations must be a non-empty list of distinct offsets, got {list(dilations)}")
    return sorted({*offsets, 0})


def valid_references(dilations: Sequence[int], length: int) -> range:
    """References whose whole clip lies inside a video of ``length`` frames; empty when the video is too short."""
    offsets = clip_offsets(dilations)
    return range(-offsets[0], max(-offsets[0], length - offsets[-1]))


def clip_indices(
    reference: int, dilations: Sequence[int], length: int, boundary: str = "clamp", reverse: bool = False
) -> list[int]:
    """Frame indices of the training clip around ``reference``.

    Args:
        reference: index of the reference frame, 0..length-1.
        dilations: offsets of the other frames, see :func:`clip_offsets`.
        length: frames of the video.
        boundary: how an offset outside the video is treated: ``clamp`` takes the nearest frame of the video,
            ``repeat_current`` the reference; ``drop`` raises (draw references from :func:`valid_references`).
        reverse: play the video backwards, so that "older" frames have larger indices.

    Returns:
        Indices, oldest first in the direction of play. The reference is at position ``clip_offsets(...).index(0)``.

    Raises:
        ValueError: bad argument, or with ``drop`` a clip that leaves the video.
    """
    if boundary not in BOUNDARIES:
        raise ValueError(f"boundary {boundary!r}: expected one of {', '.join(BOUNDARIES)}")
    if not 0 <= reference < length:
        raise ValueError(f"reference {reference} lies outside the video of {length} frames")
    sign = -1 if reverse else 1
    indices = []
    for offset in clip_offsets(dilations):
        index = reference + sign * offset
        if not 0 <= index < length:
            if boundary == "drop":
                raise ValueError(f"offset {offset} from frame {reference} leaves the video of {length} frames")
            index = min(max(index, 0), length - 1) if boundary == "clamp" else reference
        indices.append(index)
    return indices


def tile_video(length: int, clip_length: int, stride: int) -> list[tuple[int, ...]]:
    """Clips that cover every frame of a test video exactly once.

    Blocks of ``clip_length * stride`` frames give ``stride`` clips each, with frames ``i, i+stride, ...``; what is left
    after the last whole block is cut into runs of at most ``clip_length`` consecutive frames. With (T, s) = (2, 3) and
    (4, 3) this is the tiling of the released THE-Mask code; any T, s and length work.

    Raises:
        ValueError: an argument is below 1 (``length`` may be 0).
    """
    if clip_length < 1 or stride < 1 or length < 0:
        raise ValueError(f"need clip_length >= 1, stride >= 1, length >= 0; got {clip_length}, {stride}, {length}")
    block = clip_length * stride
    whole = length // block * block
    clips = [
        tuple(range(first, first + block, stride))
        for start in range(0, whole, block)
        for first in range(start, start + stride)
    ]
    clips += [tuple(range(s, min(s + clip_length, length))) for s in range(whole, length, clip_length)]
    return clips
