"""What real video files do: times, orientation, tracks, damage, names, seeking; written times, sound and colours."""

import functools
import http.server
import os
import signal
import subprocess
import sys
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image
from stream_cases import CountingStream, encode, number_of, picture, rotate_in_place, write_video

from the_mask.cli.import_ import open_video
from the_mask.data.classes import make_class_list
from the_mask.data.exporters.cvat import CvatMasksExporter
from the_mask.data.importers import import_dataset
from the_mask.engine.signals import interrupted_by_signals
from the_mask.inference.annotation_sink import AnnotationSink
from the_mask.inference.demo import DemoStyle, check_outputs, run_demo
from the_mask.inference.live.frame_source import FrameSource, TimedFrame, check_fps
from the_mask.inference.live.many_streams import StreamEngine
from the_mask.inference.live.sources import open_source
from the_mask.inference.live.video_file import turned
from the_mask.inference.rendering.render import Palette
from the_mask.inference.rendering.video_writer import VideoWriter
from the_mask.modeling.stream import NO_HINTS, Stream

PALETTE = Palette(["left", "right"], [[250, 30, 30], [30, 30, 250]])
PLAIN = DemoStyle(alpha=0, legend=False)
SIZE = (240, 320)  # not enlarged by the demo
QUARTERS = [(220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 220)]
FOUR = make_class_list(["a", "b", "c", "d"], colors=QUARTERS)


class Halves(Stream):
    """Left half class 0, right half class 1."""

    def init_state(self):
        return self.new_state(seen=0)

    def step(self, frame, state, hints=NO_HINTS):
        state = self.continue_state(state, frame.shape[:2])
        labels = np.zeros(frame.shape[:2], dtype=np.uint8)
        labels[:, frame.shape[1] // 2 :] = 1
        return torch.from_numpy(labels), {**state, "seen": state["seen"] + 1}


def write(path, pictures, codec="libx264", rate=10, kind=None, options=None, times=None, pix_fmt="yuv420p", **set_up):
    """A video with whatever the test needs; ``times`` in seconds, ``set_up`` are attributes of the codec context."""
    with av.open(f"file:{path}", "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        context = stream.codec_context
        context.height, context.width, context.pix_fmt = *pictures[0].shape[:2], pix_fmt
        context.bit_rate = 0 if codec == "libx264" else 8_000_000  # brightness tells the frames apart
        unit = Fraction(1, 1000) if times is not None else Fraction(1) / Fraction(rate)
        if times is not None:
            context.time_base = unit
        for name, value in set_up.items():
            setattr(context, name, value)
        for number, image in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.time_base, frame.pts = unit, round(times[number] / unit) if times is not None else number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbered(count, size=(48, 64)):
    return [picture(i, size) for i in range(count)]


def stamps(path, problems=None):
    with open_source(path, on_problem=None if problems is None else problems.append) as source:
        frames = list(source.timed())
    return [number_of(frame.image) for frame in frames], [frame.seconds for frame in frames]


def duration(path):
    with av.open(f"file:{path}") as container:
        return container.duration / av.time_base


B_FRAMES = {"bf": "3", "b-adapt": "0", "g": "12", "crf": "8", "preset": "veryfast"}


class TestTimes:
    @pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
    @pytest.mark.parametrize("kind", ["avi", "mp4", "mkv", "ts", "mpg"])
    def test_frames_come_in_presentation_order(self, tmp_path, kind, codec):
        if (codec, kind) == ("libx264", "mpg"):
            pytest.skip("MPEG program streams hold MPEG-2 here")
        options = B_FRAMES if codec == "libx264" else {"bf": "2", "g": "12"}
        codec = "mpeg2video" if kind == "mpg" else codec
        path = write(tmp_path / f"b.{kind}", numbered(30), codec, rate=25, options=options)
        numbers, times = stamps(path)
        assert numbers == list(range(30))
        assert np.diff(times) == pytest.approx(0.04, abs=1e-3)
        with StreamEngine(CountingStream()) as engine:
            engine.add(path)
            assert [result.reset for result in engine.results()] == [""] * 30

    def test_avi_that_leaves_frames_out(self, tmp_path):
        path = write(tmp_path / "v.avi", numbered(6), "mpeg4", times=[0, 0.1, 0.2, 0.7, 0.8, 0.9], options={"bf": "0"})
        assert stamps(path) == ([0, 1, 2, 3, 4, 5], pytest.approx([0, 0.1, 0.2, 0.7, 0.8, 0.9], abs=1e-3))

    TIMES = (0, 0.1, 0.15, 0.9, 1.0, 3.5, 9.0)

    @pytest.mark.parametrize("kind", ["mp4", "mkv", "mov", "avi"])
    def test_written_video_has_the_times_and_the_duration_of_its_input(self, tmp_path, kind):
        given = tmp_path / "vfr.mkv"
        given.write_bytes(encode(numbered(7, SIZE), self.TIMES, kind="matroska"))
        output = tmp_path / f"out.{kind}"
        with open_source(given) as source:
            run_demo(Halves(), source, PALETTE, output, style=PLAIN)
        _, times = stamps(output)
        exact = kind != "avi"
        assert times == pytest.approx(self.TIMES, abs=2e-3 if exact else 0.5)
        assert len(times) == 7
        assert duration(output) == pytest.approx(duration(given), abs=0.15 if exact else 0.7)

    @pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(24000, 1001), 25, 1000, Fraction(1, 1800)])
    @pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
    def test_constant_rates_are_exact(self, tmp_path, rate, encoder):
        path = tmp_path / "v.mp4"
        with VideoWriter(path, rate, encoder) as writer:
            for number in range(5):
                writer.write(TimedFrame(picture(number), 7 + float(number / rate)))
        with open_source(path) as source:
            assert source.fps == rate
            times = [frame.seconds for frame in source.timed()]
        assert times == pytest.approx([float(number / rate) for number in range(5)], rel=1e-6, abs=1e-6)
        assert duration(path) == pytest.approx(float(5 / rate), rel=1e-3)

    def test_rates_that_look_wrong_refuse_no_file(self, tmp_path):
        codec = "libvpx-vp9"
        path = write(tmp_path / "v.webm", numbered(5), codec, 1000, options={"deadline": "realtime"})
        with open_source(path) as source:
            assert source.fps == 1000
            assert [frame.seconds for frame in source.timed()] == pytest.approx([0, 0.001, 0.002, 0.003, 0.004])
        path = write(tmp_path / "tape.dv", numbered(3, (576, 720)), "dvvideo", 25, "dv")
        with open_source(path) as source:
            assert source.fps == 25
            assert [frame.seconds for frame in source.timed()] == pytest.approx([0, 0.04, 0.08])

    @pytest.mark.parametrize("seconds", [1800, 3600])
    def test_slow_pictures(self, tmp_path, seconds):
        given = tmp_path / "slow.mp4"
        count = 1 if seconds == 3600 else 3
        write(given, numbered(count, SIZE), rate=Fraction(1, seconds))
        with open_source(given) as source:
            assert source.fps == Fraction(1, seconds)
            with StreamEngine(CountingStream()) as engine:
                engine.add(given)
                assert [result.reset for result in engine.results()] == [""] * count
            run_demo(Halves(), source, PALETTE, tmp_path / "out.mp4", style=PLAIN)
        assert duration(tmp_path / "out.mp4") == pytest.approx(count * seconds)

    @pytest.mark.parametrize("fps", [0.0004, 2.5, 29.97002997])
    def test_a_given_rate_holds_for_everything(self, tmp_path, fps):
        given = write_video(tmp_path / "v.mp4", 4)
        with open_source(given, fps) as source:
            assert source.fps == check_fps(fps)
            assert [frame.seconds for frame in source.timed()] == pytest.approx([n / fps for n in range(4)], rel=1e-6)
        assert check_fps(29.97002997) == Fraction(30000, 1001)
        for bad in (0, -1, float("nan"), 20_000, 1e-9):
            with pytest.raises(ValueError, match="frames per second"):
                check_fps(bad)

    def test_times_that_go_back_are_written_on(self, tmp_path):
        with VideoWriter(tmp_path / "v.mp4", 10) as writer:
            for seconds in (5, 5.1, 5.2, 0, 0.1):
                writer.write(TimedFrame(picture(0), seconds))
        assert stamps(tmp_path / "v.mp4")[1] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def shown_by(matrix, image):
    """Every stored pixel put where a display matrix says, one by one."""
    a, b, _, c, d = matrix[:5]
    height, width = image.shape[:2]
    places = {(x, y): (a * x + c * y, b * x + d * y) for x in range(width) for y in range(height)}
    left, top = (min(place[i] for place in places.values()) for i in (0, 1))
    right, bottom = (max(place[i] for place in places.values()) for i in (0, 1))
    shown = np.zeros((bottom - top + 1, right - left + 1, *image.shape[2:]), image.dtype)
    for (x, y), (u, v) in places.items():
        shown[v - top, u - left] = image[y, x]
    return shown


MATRICES = [(a, b, 0, c, d, 0) for a, b, c, d in [(s, 0, 0, t) for s in (1, -1) for t in (1, -1)]]
MATRICES += [(0, s, 0, t, 0, 0) for s in (1, -1) for t in (1, -1)]


def quarters(height=48, width=64):
    """Four quarters of four colours, so that every orientation looks different."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2] = QUARTERS[0]
    image[: height // 2, width // 2 :] = QUARTERS[1]
    image[height // 2 :, : width // 2] = QUARTERS[2]
    image[height // 2 :, width // 2 :] = QUARTERS[3]
    return image


class NearestColour(Stream):
    """The class of a pixel is the colour of :data:`QUARTERS` that is nearest."""

    @staticmethod
    def label(frame):
        return ((frame[..., None, :].astype(int) - QUARTERS) ** 2).sum(-1).argmin(-1).astype(np.uint8)

    def init_state(self):
        return self.new_state(seen=0)

    def step(self, frame, state, hints=NO_HINTS):
        state = self.continue_state(state, frame.shape[:2])
        return torch.from_numpy(self.label(frame)), {**state, "seen": state["seen"] + 1}


def close_to(frame, expected):
    assert frame.shape == expected.shape
    assert np.abs(frame.astype(int) - expected).mean() < 8


class TestPictures:
    @pytest.mark.parametrize("matrix", MATRICES)
    def test_display_matrices_with_mirrors(self, tmp_path, matrix):
        small = np.arange(12, dtype=np.uint8).reshape(3, 4)
        np.testing.assert_array_equal(turned(small, np.array(matrix)), shown_by(matrix, small))
        path = write(tmp_path / "v.mp4", [quarters()])
        rotate_in_place(path, matrix)
        with open_source(path) as source:
            close_to(next(iter(source)), shown_by(matrix, quarters()))

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_of_a_single_picture(self, tmp_path, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        (tmp_path / "folder").mkdir()
        for path in (tmp_path / "x.jpg", tmp_path / "folder" / "x.jpg"):
            Image.fromarray(quarters()).save(path, exif=exif)
        single, folder = (next(iter(open_source(tmp_path / name))) for name in ("x.jpg", "folder"))
        np.testing.assert_array_equal(single, folder)
        if orientation != 1:
            assert np.abs(single.astype(int)[:8, :8] - quarters()[:8, :8]).mean() > 50 or orientation in (5,)

    @pytest.mark.parametrize("kind", ["gif", "webp", "png"])
    def test_animations(self, tmp_path, kind):
        pages = [Image.fromarray(picture(number)) for number in range(4)]
        path = tmp_path / f"x.{kind}"
        options = {"lossless": True} if kind == "webp" else {}
        pages[0].save(path, save_all=True, append_images=pages[1:], duration=[100, 300, 50, 200], **options)
        with open_source(path) as source:
            assert source.num_frames == 4
            frames = source.timed()
            found = [next(frames) for _ in range(4)]
            assert [number_of(frame.image) for frame in found] == [0, 1, 2, 3]
            assert [frame.seconds for frame in found] == pytest.approx([0, 0.1, 0.4, 0.45])
        with open_source(path) as source:
            frames = source.timed()
            next(frames)
            source.seek(0.42)
            assert [number_of(frame.image) for frame in frames] == [2, 3]
        with open_source(path, fps=2) as source:
            assert [frame.seconds for frame in source.timed()] == [0, 0.5, 1, 1.5]

    def test_no_frame_of_a_folder_gets_lost(self, tmp_path):
        for number in range(3):
            Image.fromarray(picture(number)).save(tmp_path / f"{number}.{'tif' if number == 1 else 'png'}")
        assert [number_of(frame) for frame in open_source(tmp_path)] == [0, 1, 2]
        (tmp_path / "3.heic").write_bytes(b"x")
        with pytest.raises(ValueError, match=r"3\.heic: is not read"):
            open_source(tmp_path)
        problems = []
        assert len(list(open_source(tmp_path, on_problem=problems.append))) == 3
        assert len(problems) == 1
        (tmp_path / "2.PNG").write_bytes((tmp_path / "2.png").read_bytes())
        with pytest.raises(ValueError, match=r"2\.png: same frame as 2\.PNG"):
            open_source(tmp_path, on_problem=problems.append)


def two_tracks(path, pictures, dispositions, codecs=("libx264", "libx264")):
    """A file with a video track for each list of pictures."""
    with av.open(str(path), "w") as container:
        streams = []
        for images, disposition, codec in zip(pictures, dispositions, codecs, strict=True):
            stream = container.add_stream(codec, rate=10)
            stream.height, stream.width = images[0].shape[:2]
            stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
            stream.disposition = disposition.value
            streams.append(stream)
        for stream, images in zip(streams, pictures, strict=True):
            for image in images:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    return path


def add_sound(path, output, codec="aac", seconds=2.0, rate=8000, wave=True):
    """The same video with a tone."""
    with av.open(str(path)) as given, av.open(str(output), "w") as container:
        video = given.streams.video[0]
        stream = container.add_stream_from_template(video)
        audio = container.add_stream(codec, rate=rate, layout="mono")
        packets = [packet for packet in given.demux(video) if packet.size]
        samples = (8000 * np.sin(np.arange(round(seconds * rate)) / 5)).astype(np.int16)[None]
        sound = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        sound.sample_rate, sound.pts = rate, 0
        for packet in packets:
            packet.stream = stream
            container.mux(packet)
        container.mux(audio.encode(sound))
        container.mux(audio.encode())
    return output


def heard(path):
    """Name, seconds and loudness of a file's sound."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        frames = list(container.decode(audio=0))
        values = np.concatenate([frame.to_ndarray().astype(float).ravel() for frame in frames])
        name, rate = container.streams.audio[0].codec_context.name, frames[0].sample_rate
    return name, values.size / rate, float(np.abs(values).mean())


class TestTracks:
    def test_the_default_track_is_shown(self, tmp_path):
        path = two_tracks(tmp_path / "v.mkv", (numbered(3), [picture(20)] * 3), (Disposition(0), Disposition.default))
        assert [number_of(frame) for frame in open_source(path)] == [20] * 3

    def test_a_cover_is_no_video(self, tmp_path):
        cover = [picture(20, (16, 16))]
        path = two_tracks(
            tmp_path / "v.mp4", (cover, numbered(3)), (Disposition.attached_pic, Disposition(0)), ("png", "libx264")
        )
        assert [number_of(frame) for frame in open_source(path)] == [0, 1, 2]

    @pytest.mark.parametrize(("ratio", "shape"), [("4:3", (240, 320)), ("1:2", (480, 240)), ("1:1", (240, 240))])
    def test_pixels_that_are_not_square(self, tmp_path, ratio, shape):
        width, height = map(int, ratio.split(":"))
        image = quarters(240, 240)
        path = write(tmp_path / "v.mp4", [image] * 2, sample_aspect_ratio=Fraction(width, height))
        with open_source(path) as source:
            close_to(next(iter(source)), quarters(*shape))
        with open_source(path, square_pixels=False) as source:
            close_to(next(iter(source)), image)
        with open_source(path) as source:
            run_demo(Halves(), source, PALETTE, tmp_path / "out.mp4", style=PLAIN)
        with av.open(str(tmp_path / "out.mp4")) as container:
            stream = container.streams.video[0]
            shown = Fraction(stream.width, stream.height) * (stream.sample_aspect_ratio or 1)
        assert shown == Fraction(width, height)

    @pytest.mark.parametrize("matrix", [None, (0, 1, 0, -1, 0, 0)], ids=["upright", "turned"])
    @pytest.mark.parametrize("ratio", [Fraction(4, 3), Fraction(1, 2), None])
    def test_annotations_have_the_pixels_that_are_stored(self, tmp_path, ratio, matrix):
        """Annotation tools show them upright, but not with square pixels; the model sees both."""
        path = tmp_path / "v.mp4"
        write(path, [quarters(80, 120)] * 2, **({} if ratio is None else {"sample_aspect_ratio": ratio}))
        if matrix is not None:
            rotate_in_place(path, matrix)
        with av.open(str(path)) as container:
            stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
        upright = stored if matrix is None else shown_by(matrix, stored)
        with open_source(path) as source:
            assert source.stored_size == upright.shape[:2]
            assert (source.size == source.stored_size) == (ratio is None)
            sink = AnnotationSink(CvatMasksExporter(tmp_path / "out", FOUR), source)
            run_demo(NearestColour(), source, Palette(list(FOUR.names), QUARTERS), None, sinks=[sink], style=PLAIN)
        # The importer compares the sizes of masks and of the video's stored frames.
        tree = tmp_path / "tree"
        import_dataset(tmp_path / "out/v.zip", "cvat-masks", tree, val_videos=0, video=path, open_video=open_video)
        for number in range(2):
            labels = np.asarray(Image.open(tree / f"data/v/mask/{number:08d}.png"))
            assert labels.shape == upright.shape[:2]
            assert (labels == NearestColour.label(upright)).mean() > 0.97

    @pytest.mark.parametrize(("kind", "codec"), [("mp4", "aac"), ("mkv", "aac"), ("mov", "pcm_s16le"), ("avi", "aac")])
    def test_sound_is_copied(self, tmp_path, kind, codec):
        given = add_sound(write(tmp_path / "v.mkv", numbered(20, SIZE)), tmp_path / "given.mkv", codec)
        output = tmp_path / f"out.{kind}"
        with open_source(given) as source:
            run_demo(Halves(), source, PALETTE, output, style=PLAIN)
        name, seconds, loudness = heard(output)
        assert name == heard(given)[0]
        assert seconds == pytest.approx(2.0, abs=0.2)
        assert loudness == pytest.approx(heard(given)[2], rel=0.2)
        assert len(stamps(output)[0]) == 20

    def test_sound_stops_with_the_pictures_or_is_dropped(self, tmp_path):
        given = add_sound(write(tmp_path / "v.mkv", numbered(20, SIZE)), tmp_path / "given.mkv")
        output = tmp_path / "out.mp4"
        with open_source(given) as source:
            run_demo(Halves(), source, PALETTE, output, style=PLAIN, max_frames=10)
        assert heard(output)[1] == pytest.approx(1.0, abs=0.25)
        with open_source(given) as source:
            run_demo(Halves(), source, PALETTE, output, style=PLAIN, audio="drop")
        assert heard(output) is None
        problems = []
        with open_source(given, fps=5, on_problem=problems.append) as source:
            run_demo(Halves(), source, PALETTE, output, style=PLAIN)
        assert heard(output) is None
        assert "its rate is changed" in problems[0]

    def test_sound_that_the_output_cannot_hold_is_said(self, tmp_path, caplog):
        given = add_sound(write(tmp_path / "v.mkv", numbered(4, SIZE)), tmp_path / "given.mov", "pcm_mulaw", 0.4)
        with open_source(given) as source:
            run_demo(Halves(), source, PALETTE, tmp_path / "out.mp4", style=PLAIN)
        assert "mp4 cannot hold pcm_mulaw" in caplog.text
        assert len(stamps(tmp_path / "out.mp4")[0]) == 4


def cut(path, share=0.55):
    path.write_bytes(path.read_bytes()[: round(share * path.stat().st_size)])
    return path


def noisy(count):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 60, (48, 64, 3)).astype(np.uint8) + picture(0) for _ in range(count)]


class TestDamage:
    @pytest.mark.parametrize(
        ("kind", "options", "said"),
        [("mp4", {"movflags": "faststart"}, "of the 40 frames"), ("mkv", {}, "of the 4.0 s"), ("avi", {}, "40 frames")],
    )
    def test_a_file_that_was_cut_says_so(self, tmp_path, kind, options, said):
        path = tmp_path / f"v.{kind}"
        with av.open(str(path), "w", options=options) as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.height, stream.width, stream.pix_fmt, stream.bit_rate = 48, 64, "yuv420p", 4_000_000
            for image in noisy(40):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        problems = []
        assert len(stamps(path, problems)[0]) == 40
        assert problems == []
        cut(path)
        numbers, _ = stamps(path, problems)
        assert 15 < len(numbers) < 30
        assert f"v.{kind} is cut off: it ends after" in problems[-1]
        assert said in problems[-1]
        with pytest.raises(ValueError, match=rf"v\.{kind} (is cut off|cannot be decoded)"):
            list(open_source(path))

    def test_an_empty_packet_repeats_its_frame(self, tmp_path):
        write(tmp_path / "v.mkv", numbered(12), "mpeg4", options={"g": "1"})
        path = tmp_path / "v.nut"
        with av.open(str(tmp_path / "v.mkv")) as given, av.open(str(path), "w") as container:
            stream = container.add_stream_from_template(given.streams.video[0], opaque=True)
            for number, packet in enumerate(p for p in given.demux(video=0) if p.size):
                if number in (3, 4, 8, 11):
                    hole = av.Packet(0)
                    hole.pts, hole.dts, hole.time_base = packet.pts, packet.dts, packet.time_base
                    packet = hole
                packet.stream = stream
                container.mux(packet)
        problems = []
        numbers, times = stamps(path, problems)
        assert problems == []
        assert numbers == [0, 1, 2, 2, 2, 5, 6, 7, 7, 9, 10, 10]
        assert times == pytest.approx([n / 10 for n in range(12)], abs=2e-3)

    def test_a_track_that_begins_later(self, tmp_path):
        first = write(tmp_path / "a.ts", numbered(5), options=B_FRAMES)
        second = add_sound(write(tmp_path / "b.mkv", numbered(5)), tmp_path / "b.ts")
        (tmp_path / "v.ts").write_bytes(first.read_bytes() + second.read_bytes())
        numbers, _ = stamps(tmp_path / "v.ts", [])
        assert numbers[:5] == list(range(5))
        assert len(numbers) == 10

    @pytest.mark.parametrize("space", [3, 8, 11])
    def test_reserved_colour_matrices_are_none(self, tmp_path, space):
        path = write(tmp_path / "v.mkv", numbered(2), colorspace=space)
        assert stamps(path)[0] == [0, 1]

    def test_trimmed_files_are_whole(self, tmp_path):
        """An edit list hides frames that the container counts."""
        path = write(tmp_path / "v.mp4", numbered(20), options=B_FRAMES)
        data = bytearray(path.read_bytes())
        place = data.index(b"elst") + 4 + 8
        length, start = (int.from_bytes(data[place + 4 * i : place + 4 * i + 4], "big") for i in (0, 1))
        data[place : place + 8] = (length // 2).to_bytes(4, "big") + (start + 1024 * 5).to_bytes(4, "big")
        path.write_bytes(data)
        problems = []
        numbers, _ = stamps(path, problems)
        assert 5 <= len(numbers) < 20
        assert problems == []


class Breaking(http.server.SimpleHTTPRequestHandler):
    """Sends at most ``limit`` bytes of a file for each of the first ``breaks`` requests that read beyond it."""

    limit, breaks = 0, 0
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        with open(self.translate_path(self.path), "rb") as file:
            data = file.read()
        start = 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        body, kind = data[start:], type(self)
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if kind.breaks and start < kind.limit < len(data):
            kind.breaks -= 1
            body = data[start : kind.limit]
        self.wfile.write(body)
        self.close_connection = True


@pytest.fixture
def breaking(tmp_path):
    handler = type("Handler", (Breaking,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield handler, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class TestNetwork:
    def serve(self, tmp_path, handler, breaks):
        path = tmp_path / "v.mp4"
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("mpeg4", rate=10, options={"g": "5"})
            stream.height, stream.width, stream.pix_fmt, stream.bit_rate = 240, 320, "yuv420p", 4_000_000
            rng = np.random.default_rng(0)
            for number in range(30):
                image = np.clip(picture(number, (240, 320)) + rng.integers(-9, 10, (240, 320, 3)), 0, 255)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")))
            container.mux(stream.encode())
        handler.limit, handler.breaks = round(0.6 * path.stat().st_size), breaks

    def results(self, url, **options):
        with StreamEngine(CountingStream()) as engine:
            name = engine.add(url, reconnect_wait=0.01, **options)
            found = list(engine.results())
            return [number_of(r.frame.image) for r in found], [r.reset for r in found], engine.reports[name]

    def test_a_file_goes_on_where_it_broke(self, tmp_path, breaking):
        handler, url = breaking
        self.serve(tmp_path, handler, 1)
        numbers, resets, report = self.results(f"{url}/v.mp4", reconnects=2)
        assert numbers == list(range(30))
        assert set(resets) == {""}
        assert report.counts["reconnected"] == 1
        assert report.error is None

    def test_attempts_are_used_up_once(self, tmp_path, breaking):
        handler, url = breaking
        self.serve(tmp_path, handler, 10**9)
        numbers, _, report = self.results(f"{url}/v.mp4", reconnects=3)
        assert numbers == list(range(len(numbers)))
        assert len(numbers) < 30
        assert report.counts["reconnected"] == 3
        assert report.error is not None


class TestNames:
    @pytest.mark.parametrize(
        "name", ["2024-01-01T10:00:00.mp4", "a:b.mkv", "http:.mp4", "100%d.mp4", "-x.mp4", "é ü.mp4"]
    )
    def test_any_name_that_the_file_system_takes(self, tmp_path, name, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with VideoWriter(name, 10) as writer:
            for number in range(3):
                writer.write(picture(number))
        assert [number_of(frame) for frame in open_source(name)] == [0, 1, 2]
        assert os.listdir(tmp_path) == [name]

    def test_a_long_url_is_no_path(self):
        with pytest.raises(ValueError, match="cannot be opened"):
            open_source("http://127.0.0.1:9/" + 400 * "x")

    def test_outputs_are_checked_first(self, tmp_path):
        given = write_video(tmp_path / "v.mp4", 3)
        (tmp_path / "folder.mp4").mkdir()
        (tmp_path / "file").touch()
        (tmp_path / "link.mp4").symlink_to(given)
        os.link(given, tmp_path / "hard.mp4")
        sheet = tmp_path / "sheet.png"
        wrong = [
            (given, None, "is the input"),
            (tmp_path / "link.mp4", None, "is the input"),
            (tmp_path / "hard.mp4", None, "is the input"),
            (tmp_path / "folder.mp4", None, "is a folder"),
            (tmp_path / "file" / "out.mp4", None, "cannot be written"),
            (tmp_path / ("x" * 250 + ".mp4"), None, "cannot be written: File name too long"),
            (tmp_path / "out.mp4", tmp_path / "sheet", "contact sheet .*ends in .png"),
            (tmp_path / "out.mp4", tmp_path / "folder.mp4", "ends in .png"),
            (tmp_path / "out.mp4", tmp_path / "out.mp4", "ends in .png"),
        ]
        before = given.read_bytes()
        for output, contact_sheet, message in wrong:
            with open_source(given) as source, pytest.raises(ValueError, match=message):
                run_demo(None, source, PALETTE, output, contact_sheet=contact_sheet)
        assert given.read_bytes() == before
        frames = tmp_path / "frames"
        frames.mkdir()
        Image.fromarray(picture(0)).save(frames / "0.png")
        for contact_sheet, message in (
            (frames / "0.png", "would become a frame"),
            (frames / "1.png", "become a frame"),
        ):
            with open_source(frames) as source, pytest.raises(ValueError, match=message):
                check_outputs(source, PALETTE, tmp_path / "out.mp4", contact_sheet)
        with open_source(frames / "0.png") as source, pytest.raises(ValueError, match="is the input"):
            check_outputs(source, PALETTE, tmp_path / "out.mp4", frames / "0.png")
        with open_source(frames) as source:
            check_outputs(source, PALETTE, frames / "out.mp4", sheet)
        assert not sheet.exists()

    def test_a_folder_without_access(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != str(tmp_path))
        with pytest.raises(ValueError, match=r"new/out\.mp4 cannot be written: access to .* is denied"):
            VideoWriter(tmp_path / "new" / "out.mp4")

    def test_a_size_beyond_the_encoder(self, tmp_path):
        source = FrameSource("wide", iter(()), Fraction(10), 1, lambda: None, size=(240, 16380))
        with pytest.raises(ValueError, match=r"out\.mp4 would be 16560x240 pixels .* does not take .* no legend"):
            check_outputs(source, PALETTE, tmp_path / "out.mp4")
        check_outputs(source, PALETTE, tmp_path / "out.mp4", style=DemoStyle(legend=False))
        with pytest.raises(ValueError, match="mpeg4 does not take"):
            VideoWriter(tmp_path / "out.mp4", encoder="mpeg4").check_size(240, 16380)


def in_a_process_of_its_own(test):
    """Run a test of this file in a fresh pytest: a signal that is not handled should end that one."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", f"{__file__}::{test}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_leave_a_playable_file(tmp_path, number):
    if "PYTEST_XDIST_WORKER" in os.environ:
        in_a_process_of_its_own(f"test_signals_leave_a_playable_file[{number:d}]")
        return
    given = write_video(tmp_path / "v.mp4", 30)

    class Stops(Halves):
        def step(self, frame, state, hints=NO_HINTS):
            if state["seen"] == 5:
                # To this thread: os.kill may be handled by another one, frames later.
                signal.raise_signal(number)
            return super().step(frame, state, hints)

    # A program started in the background of a shell ignores Ctrl-C.
    original = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        before = signal.getsignal(number)
        with open_source(given) as source, interrupted_by_signals():
            report = run_demo(Stops(), source, PALETTE, tmp_path / "out.mp4")
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, original)
    assert report.interrupted
    assert len(stamps(tmp_path / "out.mp4")[0]) == report.frames == 5


class TestSeeking:
    @pytest.mark.parametrize(
        ("kind", "codec"),
        [("ts", "libx264"), ("m2ts", "libx264"), ("h264", "libx264"), ("avi", "libx264"), ("mp4", "libx264"),
         ("mpg", "mpeg2video"), ("mkv", "mpeg4"), ("m4v", "mpeg4")],
    )  # fmt: skip
    @pytest.mark.parametrize("gop", [7, 100])
    def test_exact_frames_in_every_container(self, tmp_path, kind, codec, gop):
        options = {**B_FRAMES, "g": str(gop)} if codec == "libx264" else {"bf": "2", "g": str(gop)}
        path = write(tmp_path / f"v.{kind}", numbered(30), codec, rate=25, options=options)
        with open_source(path) as source:
            times = [frame.seconds for frame in source.timed()]
        with open_source(path) as source:
            frames = source.timed()
            next(frames)
            for target in (17, 3, 28, 0, 29):
                source.seek(times[target])
                frame = next(frames)
                assert (number_of(frame.image), frame.seconds) == (target, pytest.approx(times[target]))
            source.seek(times[20])
            assert [number_of(frame.image) for frame in frames] == list(range(20, 30))

    def test_the_frame_shown_at_a_time(self, tmp_path):
        path = tmp_path / "v.mkv"
        path.write_bytes(encode(numbered(5), [0, 1, 5, 6, 20], kind="matroska"))
        with open_source(path) as source:
            frames = source.timed()
            for seconds, number in ((4.5, 1), (19, 3), (0.4, 0), (30, 4), (5, 2)):
                source.seek(seconds)
                assert number_of(next(frames).image) == number

    def test_with_a_rate_of_its_own(self, tmp_path):
        path = write_video(tmp_path / "v.mp4", 12, gop=4)
        with open_source(path, fps=2) as source:
            frames = source.timed()
            next(frames)
            source.seek(4.5)
            assert [(number_of(frame.image), frame.seconds) for frame in frames] == [(9, 4.5), (10, 5), (11, 5.5)]


# Recommendations BT.601 and BT.709: share of red and blue in luma.
WEIGHTS = {601: (0.299, 0.114), 709: (0.2126, 0.0722)}


def limited_range(rgb, standard):
    """Y, Cb, Cr of a colour, in 8 bits of the limited range."""
    red, green, blue = (value / 255 for value in rgb)
    kr, kb = WEIGHTS[standard]
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    return [16 + 219 * luma, 128 + 112 * (blue - luma) / (1 - kb), 128 + 112 * (red - luma) / (1 - kr)]


class TestColours:
    @pytest.mark.parametrize("kind", ["mp4", "mkv", "mov", "avi"])
    @pytest.mark.parametrize(("lines", "standard", "tag"), [(480, 601, 6), (720, 709, 1)])
    def test_written_colours_are_tagged_and_right(self, tmp_path, lines, standard, tag, kind):
        colour = (0, 200, 60)
        path = tmp_path / f"v.{kind}"
        with VideoWriter(path, 10) as writer:
            for _ in range(2):
                writer.write(np.full((lines, 64, 3), colour, np.uint8))
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            assert (frame.colorspace, frame.color_range) == (tag, 1)
            assert (frame.color_primaries, frame.color_trc) == (tag, tag)
            planes = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[4, 4] for plane in frame.planes]
        assert planes == pytest.approx(limited_range(colour, standard), abs=2)
        np.testing.assert_allclose(next(iter(open_source(path)))[8, 8], colour, atol=4)

    @pytest.mark.parametrize(("lines", "standard"), [(480, 601), (720, 709)])
    def test_untagged_video_is_read_as_players_show_it(self, tmp_path, lines, standard):
        colour = (0, 200, 60)
        planes = [round(value) for value in limited_range(colour, standard)]
        frame = av.VideoFrame(64, lines, "yuv420p")
        for plane, value in zip(frame.planes, planes, strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        path = tmp_path / "v.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
            stream.height, stream.width, stream.pix_fmt = lines, 64, "yuv420p"
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        np.testing.assert_allclose(next(iter(open_source(path)))[8, 8], colour, atol=4)
