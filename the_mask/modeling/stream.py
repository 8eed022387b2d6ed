"""The interface of everything that processes a video frame by frame, and the format of its state.

Streams are nested: a segmentor takes network input; windows, views, stages, ensembles and post-processing wrap another
stream and keep its state inside their own. A state is a plain dict of tensors, numbers, text and lists, bounded
and readable by ``torch.load(weights_only=True)``::

    {"stream": name of the class it belongs to, "version": STATE_VERSION,
     "size": [H, W] of the frames ([] before the first), "seen": frames since the start or the last change of size,
     "resets": changes of size, ... what the stream itself keeps}

Everywhere, a frame whose size differs from the previous one resets the stream.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from the_mask.modeling.pixel.context.prior_map import PriorMap

STATE_VERSION = 1
StreamState = dict[str, Any]
FrameName = tuple[str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class Hints:
    """Information about a frame besides its pixels. A stream ignores what it does not use, except a prior.

    Attributes:
        name: (video, frame), for streams that read or write files.
        prior: class prior of the frame, of its size, for models that read one.
        keyframe: make it a keyframe, if the model has keyframes.
    """

    name: FrameName | None = None
    prior: PriorMap | None = None
    keyframe: bool = False


NO_HINTS = Hints()


class Stream:
    """Turns frames, one after the other, into scores or labels; its memory is a state that the caller keeps.

    One object can process any number of streams at the same time::

        state = stream.init_state()
        for frame in frames:
            output, state = stream.step(frame, state)

    Attributes:
        num_classes: K.
    """

    num_classes: int

    @property
    def looks_back(self) -> bool:
        """Whether results depend on earlier frames; True unless a subclass says otherwise.

        Frames of a stream that does not look back can be computed in any order and in one batch.
        """
        return True

    @property
    def reads_prior(self) -> bool:
        """Whether a frame may come with a class prior."""
        return False

    @property
    def keyframe_interval(self) -> int:
        """Largest number of frames from one keyframe to the next; 0 without keyframes or without a limit."""
        return 0

    @abstractmethod
    def init_state(self) -> StreamState:
        """State of a stream before its first frame."""
        raise NotImplementedError

    @abstractmethod
    def step(self, frame: Any, state: StreamState, hints: Hints = NO_HINTS) -> tuple[Tensor, StreamState]:
        """Segment the next frame of a stream.

        Args:
            frame: network input [3, H, W], RGB 0..255, for a segmentor; uint8 RGB [H, W, 3] for what wraps one.
            state: of :meth:`init_state` or the last step; not changed.
            hints: further information about the frame.

        Returns:
            scores or labels, and the new state.

        Raises:
            ValueError: a frame of the wrong form, a state of another stream or version, or a prior that nothing reads.
        """
        raise NotImplementedError

    def step_many(
        self, frames: Sequence[Any], states: Sequence[StreamState], hints: Sequence[Hints] | None = None
    ) -> tuple[list[Tensor], list[StreamState]]:
        """Advance several streams by one frame each, with the results of :meth:`step`; subclasses may batch them."""
        hints = [NO_HINTS] * len(frames) if hints is None else hints
        steps = [self.step(*arguments) for arguments in zip(frames, states, hints, strict=True)]
        return [output for output, _ in steps], [state for _, state in steps]

    def is_keyframe(self, state: StreamState) -> bool | None:
        """Whether the last frame was a keyframe; None for a stream without keyframes."""
        return None

    def check_hints(self, hints: Hints) -> None:
        """Raise a ValueError for a prior that nothing reads."""
        if hints.prior is not None and not self.reads_prior:
            raise ValueError("a prior was given, but no block of the model reads one (class_memory would)")

    def new_state(self, **content: Any) -> StreamState:
        """A new state before the first frame, with the stream's own content."""
        return {
            "stream": type(self).__name__,
            "version": STATE_VERSION,
            "size": [],
            "seen": 0,
            "resets": 0,
            **content,
        }

    def continue_state(self, state: StreamState, size: Sequence[int]) -> StreamState:
        """The state to process a frame of ``size`` (H, W) with: a new one if earlier frames had another size.

        Raises:
            ValueError: not a state, or one of another stream or version.
        """
        self.check_state(state)
        if state["size"] and list(state["size"]) != list(size):
            state = {**self.init_state(), "resets": state["resets"] + 1}
        return {**state, "size": list(size)}

    def check_state(self, state: StreamState) -> None:
        """Raise a ValueError unless this is a state of this stream, in the current format."""
        own = type(self).__name__
        if not isinstance(state, dict) or ("size" not in state and "stream" not in state):
            raise ValueError(f"not a state of {own}; make one with init_state()")
        found, version = state.get("stream"), state.get("version", 0)
        if version != STATE_VERSION:
            raise ValueError(
                f"a stream state of version {version}, but this the_mask reads version {STATE_VERSION}: start the "
                "stream anew with init_state()"
            )
        if found != own:
            raise ValueError(f"a state of {found}, not of {own}; make one with init_state()")


class Around(Stream):
    """A stream around another stream.

    Attributes:
        model: what it wraps.
    """

    model: Any

    @property
    def looks_back(self) -> bool:
        """The model's."""
        return self.model.looks_back

    @property
    def reads_prior(self) -> bool:
        """The model's."""
        return self.model.reads_prior


@dataclass(frozen=True)
class Ring:
    """Chooses the past frames that a stream keeps and reads. The entries are a list in its state, oldest first.

    Attributes:
        frames: entries that are read.
        stride: frames from one to the next.
        newest: how many frames back the newest entry to read is; 1 is the last one pushed.
    """

    frames: int
    stride: int = 1
    newest: int = 1

    @property
    def capacity(self) -> int:
        """Largest number of entries that are kept."""
        return self.newest + (self.frames - 1) * self.stride if self.frames else 0

    def push(self, entries: Sequence[T], entry: T) -> list[T]:
        """A new list with the new entry, without entries too old to be read again."""
        return [*entries, entry][-self.capacity :] if self.capacity else []

    def read(self, entries: Sequence[T]) -> list[T]:
        """The entries to read, oldest first; fewer near a stream's start."""
        return list(entries[::-1][self.newest - 1 :: self.stride][: self.frames][::-1])
