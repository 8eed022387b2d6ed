"""Video files and URLs by PyAV: frames in presentation order, upright, with square pixels and right colours."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Colorspace, VideoReformatter

from the_mask.inference.live.frame_source import (
    DEFAULT_FPS,
    MAX_FPS,
    Frame,
    FrameSource,
    OnProblem,
    Position,
    TimedFrame,
)

# Time limits in seconds for opening a URL, and for its next packet.
NETWORK_TIMEOUT = (10.0, 10.0)
# URLs of these protocols deliver frames at their own pace; a file behind http waits for its reader.
LIVE_PROTOCOLS = ("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "srt", "tcp")
# A time that goes back by less than this many seconds, at a frame that is not a keyframe, is wrong.
MAX_REORDER = 1.0
# From this height on, players treat untagged colours as BT.709 (HD television).
HD_LINES = 720
UNSPECIFIED = 2
# Matrices of ITU-T H.273 that FFmpeg converts: RGB, BT.709, none given, FCC, BT.601 (two names), SMPTE 240M, BT.2020.
COLOUR_MATRICES = (0, 1, UNSPECIFIED, 4, 5, 6, 7, 9)
# Steps back, in seconds, of a seek that landed too late. The first frames after a seek in a stream without an index are
# incomplete and have rough times.
STEPS_BACK = {"mpegts": (2.0, 8.0, 32.0), "mpeg": (2.0, 8.0, 32.0)}
USUAL_STEPS_BACK = (0.0, 1.0, 4.0, 16.0)
# A pixel aspect ratio beyond this is treated as a wrong tag.
MAX_PIXEL_RATIO = 4


def open_video(
    name: str,
    fps: Fraction | None,
    on_problem: OnProblem | None,
    max_bad_packets: int,
    square_pixels: bool = True,
) -> FrameSource:
    """Open a file or URL and decode its first frame.

    Raises:
        ValueError: it cannot be opened, has no video track or no frame.
    """
    decoder = VideoDecoder(name, fps, on_problem, max_bad_packets, square_pixels)
    try:
        first = decoder.position.first(f"video {name} holds no frame")
    except ValueError:
        decoder.close()
        raise
    decoder.start = first.seconds
    sound = decoder.url if fps is None and decoder.has_sound and not decoder.live else None
    if decoder.has_sound and sound is None and on_problem is not None:
        on_problem(f"the sound of {name} is left out: {'it is live' if decoder.live else 'its rate is changed'}")
    return FrameSource(
        name,
        decoder.position,
        decoder.rate,
        decoder.stream.frames or None,
        decoder.close,
        decoder.live,
        None if decoder.live else decoder.seek,
        size=(first.image.shape[0], first.image.shape[1]),
        stored_size=decoder.stored_size,
        path=None if decoder.remote else Path(name),
        sound=sound,
    )


def open_container(url: str, live: bool = False) -> Any:
    """An input container of PyAV.

    Raises:
        ValueError: it cannot be opened.
    """
    # Buffering ahead would add its length to the latency of a live stream.
    options = {"fflags": "nobuffer"} if live else {}
    timeout = NETWORK_TIMEOUT if "://" in url else None
    try:
        # A title in another encoding must not make a video unreadable.
        # PyAV 19 has no such argument: it reads what is not UTF-8 without an error.
        lenient: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
        return av.open(url, options=options, timeout=timeout, **lenient)
    except (av.error.FFmpegError, OSError) as error:
        reason = error.strerror or error
        if timeout is not None:
            raise ValueError(f"video {url} cannot be opened: nothing answers there, or no video: {reason}") from error
        name = url.removeprefix("file:")
        raise ValueError(f"video {name} cannot be opened, it is truncated or not a video: {reason}") from error


class _Shown(NamedTuple):
    """A decoded picture of PyAV, its time and its duration."""

    picture: Any
    seconds: float
    duration: float


class VideoDecoder:
    """Decodes packet by packet, so that a damaged packet affects nothing else.

    Attributes:
        rate: frames per second: as given, or as stored in the file if plausible.
        live, remote: whether it is a URL that delivers at its own pace; whether it is a URL.
        position: the remaining frames; :meth:`seek` moves it.
        start: time of the first frame, set by the caller that takes it.
        stored_size: (height, width) of the last frame, upright, before its pixels are made square.
    """

    def __init__(
        self,
        name: str,
        fps: Fraction | None,
        on_problem: OnProblem | None,
        max_bad_packets: int,
        square_pixels: bool = True,
    ) -> None:
        self.name, self.on_problem, self.max_bad_packets = name, on_problem, max_bad_packets
        self.remote = "://" in name
        self.live = name.partition("://")[0].lower() in LIVE_PROTOCOLS
        # A name such as 10:00.mp4 would be taken for a protocol.
        self.url = name if self.remote else f"file:{name}"
        self.square_pixels = square_pixels
        self.reformatter = VideoReformatter()
        self.given_rate = fps
        self._open()
        self.has_sound = bool(self.container.streams.audio)
        self.rate = fps or _stored_rate(self.stream)
        self.start = 0.0
        self.stored_size: tuple[int, int] | None = None
        self.count = 0
        self.position = Position(self._frames(self._pictures()))

    def _open(self) -> None:
        self.container = open_container(self.url, self.live)
        try:
            self.stream = _video_track(self.container, self.name)
        except ValueError:
            self.container.close()
            raise
        # Frame threading would delay frames by the number of threads.
        self.stream.thread_type = "SLICE" if self.live else "AUTO"

    def close(self) -> None:
        self.container.close()

    def seek(self, seconds: float) -> None:
        """Go on with the frame shown at this time.

        In containers without an index a seek may land too late, and some cannot seek at all: then step further back,
            and
        finally start from the beginning.

        Raises:
            ValueError: the file cannot be opened again.
        """
        wanted = max(seconds, self.start)
        timed = self.given_rate is None and (self.stream.start_time is not None or self.stream.duration is not None)
        for back in STEPS_BACK.get(self.container.format.name, USUAL_STEPS_BACK) if timed else ():
            if wanted - back < self.start - 1:
                break
            try:
                # Seek to the last keyframe before it, and decode up to the wanted frame.
                self.container.seek(int((wanted - back) * av.time_base))
            except av.error.FFmpegError:
                break
            if self._go_on_at(wanted, self._pictures(from_start=False)):
                return
        self.container.close()
        self._open()
        self._go_on_at(wanted, self._pictures(), late=True)

    def _go_on_at(self, wanted: float, pictures: Iterator[_Shown], late: bool = False) -> bool:
        """Find the last frame at or before a time; False if the first one is after it, unless ``late`` allows that."""
        found: list[_Shown] = []
        for picture in pictures:
            if picture.seconds > wanted + 0.5 / float(self.rate):
                if not found and not late:
                    return False
                found.append(picture)
                break
            found = [picture]
        self.position.move(self._frames(chain(found, pictures)))
        return bool(found)

    def _frames(self, pictures: Iterable[_Shown]) -> Iterator[TimedFrame]:
        picture, image = None, np.empty(0, np.uint8)
        for shown in pictures:
            if shown.picture is not picture:
                picture, image = shown.picture, self._image(shown.picture)
            yield TimedFrame(image, shown.seconds, shown.duration)

    def _pictures(self, from_start: bool = True) -> Iterator[_Shown]:
        """Decode from the container's current position."""
        clock = _Clock(self.stream, self.rate, self.given_rate, self.container.format.name == "avi")
        packets = self.container.demux(self.stream)
        last: _Shown | None = None
        repeats: list[float] = []
        bad = seen = 0
        while (packet := self._next_packet(packets)) is not None:
            stamp = packet.dts if packet.pts is None else packet.pts
            seen += bool(packet.size) or stamp is not None
            if not packet.size and stamp is not None:
                # An empty packet repeats the previous frame; a decoder would take it for the end of the stream.
                heapq.heappush(repeats, float(stamp * packet.time_base))
                continue
            clock.packet(packet)
            try:
                pictures = packet.decode()
            except av.error.FFmpegError as error:
                bad += 1
                clock.lost()
                where = f"video {self.name} cannot be decoded after frame {self.count}: {error}"
                if self.on_problem is None or bad >= self.max_bad_packets:
                    raise ValueError(where) from error
                self.on_problem(f"a packet is skipped, {where}")
                continue
            for picture in pictures:
                bad = 0
                seconds, shown = clock.time(picture)
                if picture.is_corrupt and self.on_problem is not None:
                    self.on_problem(f"frame {self.count} of {self.name} is damaged; the decoder filled it in")
                while last is not None and repeats and repeats[0] < seconds:
                    yield clock.repeated(last, heapq.heappop(repeats))
                    self.count += 1
                last = _Shown(picture, seconds, shown)
                yield last
                self.count += 1
        while last is not None and repeats:
            yield clock.repeated(last, heapq.heappop(repeats))
        self._say_shortage(seen if from_start else None, clock.ticks(), last)

    def _next_packet(self, packets: Iterator[Any]) -> Any:
        try:
            return next(packets, None)
        except av.error.FFmpegError as error:
            raise ValueError(f"video {self.name} cannot be read after frame {self.count}: {error}") from error
        except IndexError:
            # When flushing, PyAV fails on tracks of a transport stream that began after it was opened.
            return None

    def _say_shortage(self, packets: int | None, ticks: int, last: _Shown | None) -> None:
        """Report a container that announces more than it has: it was cut off, or the connection broke."""
        announced, expected = self.stream.frames, _announced_end(self.stream)
        end = 0.0 if last is None else last.seconds + last.duration
        if packets is not None and ticks:
            # An AVI announces its length in frames and may leave some out, also at the end.
            packets = max(packets, ticks)
            announced = 0 if announced - packets < self.rate else announced
        if packets is not None and packets < announced:
            text = f"{packets} of the {announced} frames that it announces"
        elif (packets is None or not announced) and self.given_rate is None and end < expected - 1:
            text = f"{end:.1f} of the {expected:.1f} s that it announces"
        else:
            return
        text = f"video {self.name} is cut off: it ends after {text}"
        if self.on_problem is None or self.remote:
            raise ValueError(text)
        self.on_problem(text)

    def _image(self, picture: Any) -> Frame:
        """RGB, with square pixels and upright, as a whole array."""
        width, height = picture.width, picture.height
        ratio = self.stream.sample_aspect_ratio if self.square_pixels else None
        if ratio and ratio != 1 and 1 / MAX_PIXEL_RATIO <= ratio <= MAX_PIXEL_RATIO:
            # Enlarged, so that nothing is lost.
            width, height = (round(width * ratio), height) if ratio > 1 else (width, round(height / ratio))
        if picture.colorspace not in COLOUR_MATRICES:
            picture.colorspace = UNSPECIFIED
        untagged = picture.colorspace == UNSPECIFIED and not picture.format.is_rgb
        space = Colorspace.ITU709 if untagged and picture.height >= HD_LINES else None
        try:
            rgb = self.reformatter.reformat(picture, width, height, "rgb24", src_colorspace=space)
        except (av.error.FFmpegError, OSError) as error:
            raise ValueError(
                f"video {self.name}: frame {self.count} ({picture.format.name}) cannot be converted to RGB: {error}"
            ) from error
        matrix = picture.side_data.get("DISPLAYMATRIX")
        image = rgb.to_ndarray()
        stored = np.broadcast_to(np.uint8(0), (picture.height, picture.width))
        if matrix is not None:
            numbers = np.frombuffer(matrix, np.int32).astype(np.float64)
            image, stored = turned(image, numbers), turned(stored, numbers)
        self.stored_size = stored.shape[0], stored.shape[1]
        return np.ascontiguousarray(image)


class _Clock:
    """Presentation times of decoded pictures."""

    def __init__(self, stream: Any, rate: Fraction, given: Fraction | None, by_packet: bool) -> None:
        """``by_packet``: AVI stores no times, so the n-th picture has the time of the n-th packet."""
        self.unit, self.step, self.given, self.by_packet = stream.time_base, 1 / float(rate), given, by_packet
        self.stamps: deque[int] = deque()
        self.first_stamp = stream.start_time or 0
        self.last_stamp: int | None = None
        self.last: float | None = None
        self.number = 0

    def packet(self, packet: Any) -> None:
        if packet.dts is not None:
            self.last_stamp = packet.dts
            if self.by_packet:
                self.stamps.append(packet.dts)

    def lost(self) -> None:
        """Count a packet that gave no picture."""
        if self.by_packet and self.stamps:
            self.stamps.pop()

    def ticks(self) -> int:
        """Number of frames up to the last packet of an AVI, including those skipped by empty chunks."""
        return self.last_stamp - self.first_stamp + 1 if self.by_packet and self.last_stamp is not None else 0

    def time(self, picture: Any) -> tuple[float, float]:
        """Time and duration of a picture, in seconds."""
        shown = float(picture.duration * self.unit) if picture.duration else self.step
        if self.given is not None:
            return self._counted()
        if self.by_packet:
            seconds = float(self.stamps.popleft() * self.unit) if self.stamps else None
        else:
            seconds = picture.time
        if seconds is None:
            seconds = 0.0 if self.last is None else self.last + shown
        elif self.last is not None and self.last - MAX_REORDER < seconds <= self.last and not picture.key_frame:
            # Decoders return pictures in presentation order, so the stored time is wrong.
            seconds = self.last + shown
        self.last = seconds
        return seconds, shown

    def repeated(self, shown: _Shown, seconds: float) -> _Shown:
        """A repeated frame."""
        if self.given is not None:
            seconds, _ = self._counted()
        return _Shown(shown.picture, seconds, shown.duration)

    def _counted(self) -> tuple[float, float]:
        assert self.given is not None
        self.number += 1
        return float((self.number - 1) / self.given), float(1 / self.given)


def turned(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply a display matrix (nine numbers, ISO 14496-12) to an image [H, W, ...]: right angles and mirroring."""
    a, b, _, c, d = matrix[:5]
    # A stored point (x, y) is shown at (a x + c y, b x + d y).
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, mirror_x, mirror_y = image.swapaxes(0, 1), c < 0, b < 0
    else:
        mirror_x, mirror_y = a < 0, d < 0
    return image[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]


def _video_track(container: Any, name: str) -> Any:
    """The default video track; cover pictures and thumbnails are not counted.

    Raises:
        ValueError: there is none, or no decoder for it.
    """
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    tracks = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not tracks:
        raise ValueError(f"{name} has no video track{' but a cover picture' if container.streams.video else ''}")
    track = next((stream for stream in tracks if stream.disposition & Disposition.default), tracks[0])
    if track.codec_context is None:
        raise ValueError(f"{name}: PyAV's FFmpeg has no decoder for its video track")
    return track


def _stored_rate(stream: Any) -> Fraction:
    """The average rate, or FFmpeg's guess if times are not stored; the default if neither is plausible."""
    rates = [stream.average_rate, stream.guessed_rate]
    if stream.start_time is None and stream.duration is None:
        rates.reverse()
    return next((Fraction(rate) for rate in rates if rate and 0 < rate <= MAX_FPS), DEFAULT_FPS)


def _announced_end(stream: Any) -> float:
    """End in seconds announced by a Matroska track or by a known number of frames; else 0."""
    if stream.frames and stream.duration:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = rest.partition(":")
    try:
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return 0.0
