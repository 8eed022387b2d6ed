"""Videos with a mark in every frame, sources that misbehave, and a stream that only counts."""

import io
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from the_mask.inference.live.sources import FrameSource, TimedFrame
from the_mask.modeling.stream import NO_HINTS, Stream

STEP = 7  # brightness from one frame to the next


def picture(number, size=(48, 64)):
    """A grey frame that tells its number, also after compression."""
    return np.full((*size, 3), 10 + STEP * number % 240, dtype=np.uint8)


def number_of(image):
    """The number of :func:`picture`."""
    return round((float(np.asarray(image).mean()) - 10) / STEP)


def encode(pictures, times=None, rate=10, kind="mp4", gop=1000):
    """Bytes of a video; ``times`` are seconds, by default one frame after the other. No B-frames."""
    buffer = io.BytesIO()
    container = av.open(buffer, "w", format=kind)
    stream = container.add_stream("libx264", rate=rate)
    stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
    stream.options = {"preset": "ultrafast", "tune": "zerolatency", "crf": "10", "g": str(gop)}
    stream.codec_context.time_base = Fraction(1, 1000)
    for number, image in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.time_base = Fraction(1, 1000)
        frame.pts = round(1000 * (times[number] if times is not None else number / rate))
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
    container.close()
    return buffer.getvalue()


def write_video(path, count=12, **options):
    """A video file of :func:`picture`."""
    Path(path).write_bytes(encode([picture(i) for i in range(count)], **options))
    return path


def source_of(frames, fps=10, live=False, name="test", closed=None):
    """An open source of an iterable of pictures or timed frames."""
    return FrameSource(
        name, frames, Fraction(fps), None, lambda: closed.append(True) if closed is not None else 0, live
    )


def timed(seconds, size=(8, 12)):
    """Timed frames with the given times."""
    return [TimedFrame(picture(i, size), s) for i, s in enumerate(seconds)]


class CountingStream(Stream):
    """The state has the list of numbers of the frames seen; the output is the frame's first channel."""

    def init_state(self):
        return self.new_state(numbers=[])

    def step(self, frame, state, hints=NO_HINTS):
        state = self.continue_state(state, frame.shape[:2])
        return torch.from_numpy(frame[..., 0].copy()), {**state, "numbers": [*state["numbers"], number_of(frame)]}


def decoder_threads():
    """Names of threads that belong to streams."""
    return [t.name for t in threading.enumerate() if t.name.startswith(("decode ", "keyframes"))]


def rotate_in_place(path, matrix):
    """Write a display matrix into the track header of an mp4 file."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    for number, value in enumerate(matrix):
        if number % 3 != 2:
            data[start + 4 * number : start + 4 * number + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
