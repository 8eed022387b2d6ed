"""Which frames make a clip: training clips around a reference, and the tiling of a test video into clips.

All functions are pure and see a single video, so a clip never crosses videos. Frame indices count from 0 in time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from the_mask.config.keys.input import BOUNDARIES


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


def clip_name(clip: Mapping[str, Any]) -> str:
    """A clip as ``dataset/video frames a, b``, for messages."""
    video = "/".join(str(clip[key]) for key in ("dataset", "video_id") if key in clip)
    frames = ", ".join(str(f) for f in clip.get("frame_ids", ()))
    return f"{video} frames {frames}" if frames else video
