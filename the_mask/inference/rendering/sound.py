"""Copies the sound of an input into the video made from it."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import Any

import av
from av.stream import Disposition

from the_mask.inference.live.video_file import open_container

logger = logging.getLogger(__name__)


class SoundCopy:
    """Copies the packets of an input's default audio track unchanged, up to given times.

    If the output cannot hold the sound, or the sound is damaged, it is left out with a warning.
    """

    def __init__(self, url: str, output: Any, format_name: str) -> None:
        """Add a track to ``output``, before its first packet.

        Args:
            url: path or URL for FFmpeg; opened separately from the decoder of the pictures.
            output: PyAV's container.
            format_name: of the output.
        """
        self.url, self.output = url, output
        self._packets: Iterator[Any] | None = None
        self._next: Any = None
        try:
            self._input = open_container(url)
        except ValueError as error:
            self._leave_out(str(error))
            return
        tracks = self._input.streams.audio
        track = next((s for s in tracks if s.disposition & Disposition.default), tracks[0] if tracks else None)
        if track is None:
            return
        try:
            # An accepted track may still be refused when the header is written, which would lose the whole video.
            with av.open(io.BytesIO(), "w", format=format_name) as trial:
                trial.add_stream_from_template(track, opaque=True)
                trial.start_encoding()
            self._track = output.add_stream_from_template(track, opaque=True)
        except (ValueError, av.error.FFmpegError) as error:
            self._leave_out(f"{format_name} cannot hold {track.codec_context.name} ({error}); .mkv holds nearly all")
            return
        self._packets = self._input.demux(track)

    def write_until(self, seconds: float, origin: float) -> None:
        """Copy the packets before a time of the input; time ``origin`` of the input is 0 in the output."""
        while self._packets is not None:
            if self._next is None:
                try:
                    self._next = next(self._packets, None)
                except av.error.FFmpegError as error:
                    self._leave_out(f"it cannot be read beyond {seconds:.1f} s: {error}")
                    return
            packet = self._next
            stamp = None if packet is None else packet.dts if packet.pts is None else packet.pts
            if packet is None or (stamp is None and not packet.size):
                self._packets = None
                return
            if stamp is not None and stamp * packet.time_base >= seconds:
                return
            self._next = None
            shift = round(origin / packet.time_base)
            if stamp is None or stamp < shift:
                continue
            packet.pts = stamp - shift
            packet.dts = packet.pts if packet.dts is None else packet.dts - shift
            packet.stream = self._track
            self.output.mux(packet)

    def stop(self, why: str) -> None:
        """Stop copying, and log why."""
        if self._packets is not None:
            self._leave_out(why)

    def close(self) -> None:
        self._packets = None
        if (source := getattr(self, "_input", None)) is not None:
            source.close()

    def _leave_out(self, why: str) -> None:
        self._packets = None
        logger.warning(f"the sound of {self.url.removeprefix('file:')} is left out: {why}")
