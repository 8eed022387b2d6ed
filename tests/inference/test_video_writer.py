"""Reading and writing videos, with synthetic files."""

import subprocess
import sys
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from PIL import Image
from stream_cases import rotate_in_place

from the_mask.inference.rendering import video_writer
from the_mask.inference.rendering.video_writer import VideoWriter, best_encoder, fit_into, open_source


def gradient(height, width, shift=0):
    """A picture that differs in every corner: red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 0] = 30 + 200 * x / max(width - 1, 1)
    image[..., 1] = 30 + 200 * y / max(height - 1, 1)
    image[..., 2] = 8 * shift
    return image


def make_video(path, count=7, size=(48, 64), fps=Fraction(30000, 1001), encoder=None):
    with VideoWriter(path, fps, encoder) as writer:
        for index in range(count):
            writer.write(gradient(*size, shift=index))
    return path


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi"])
def test_round_trip(tmp_path, encoder, suffix):
    path = make_video(tmp_path / f"new/video{suffix}", encoder=encoder)
    assert list(path.parent.iterdir()) == [path], "no partial file stays"
    with open_source(path) as source:
        assert source.fps == pytest.approx(30000 / 1001, rel=2e-3 if suffix == ".mkv" else 1e-6)
        frames = list(source)
    assert len(frames) == 7
    for index, frame in enumerate(frames):
        assert frame.dtype == np.uint8
        difference = np.abs(frame.astype(int) - gradient(48, 64, shift=index))
        assert difference.mean() < 4


def test_number_of_frames_is_known(tmp_path):
    with open_source(make_video(tmp_path / "v.mp4")) as source:
        assert (source.num_frames, source.fps) == (7, Fraction(30000, 1001))


@pytest.mark.parametrize("size", [(47, 63), (48, 63), (1, 1), (47, 64)])
def test_odd_sides_are_padded(tmp_path, size):
    path = make_video(tmp_path / "v.mp4", size=size)
    with open_source(path) as source:
        frame = next(iter(source))
    assert frame.shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [((0, 1, 0, -1, 0, 0), -1), ((0, -1, 0, 1, 0, 0), 1), ((-1, 0, 0, 0, -1, 0), 2)],
    ids=["90 clockwise", "90 counter-clockwise", "180"],
)
def test_rotated_videos_are_turned_upright(tmp_path, matrix, turns):
    path = make_video(tmp_path / "v.mp4", count=1)
    rotate_in_place(path, matrix)
    with open_source(path) as source:
        frame = next(iter(source))
    expected = np.rot90(gradient(48, 64), turns)
    assert frame.shape == expected.shape
    assert np.abs(frame.astype(int) - expected).mean() < 4


def test_size_changes_are_fitted(tmp_path, caplog):
    path = tmp_path / "v.mp4"
    with VideoWriter(path, 10) as writer:
        writer.write(np.full((40, 80, 3), 200, dtype=np.uint8))
        writer.write(np.full((40, 40, 3), 200, dtype=np.uint8))
        writer.write(np.full((80, 160, 3), 200, dtype=np.uint8))
    assert caplog.text.count("fitted into 40x80") == 1
    with open_source(path) as source:
        frames = list(source)
    assert [frame.shape for frame in frames] == [(40, 80, 3)] * 3
    assert frames[1][20, 5].max() < 30
    assert frames[1][20, 40].min() > 180
    assert frames[2].min() > 180


def test_fit_into_keeps_the_ratio():
    wide = fit_into(np.full((10, 40, 3), 9, dtype=np.uint8), 20, 20)
    rows = np.flatnonzero(wide[:, 10, 0])
    assert (rows.min(), rows.max()) == (7, 11)
    assert fit_into(wide, 20, 20) is wide


def test_folder_is_sorted_by_number(tmp_path):
    for number in (10, 9, 100, 1):
        Image.fromarray(np.full((4, 6, 3), number, dtype=np.uint8)).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "._frame_1.png").write_text("x")
    with open_source(str(tmp_path)) as source:
        assert (source.num_frames, source.fps) == (4, 15)
        assert [int(frame[0, 0, 0]) for frame in source] == [1, 9, 10, 100]


def test_folder_of_a_vspw_video(tmp_path):
    (tmp_path / "origin").mkdir()
    Image.fromarray(np.zeros((4, 6, 3), dtype=np.uint8)).save(tmp_path / "origin" / "1.jpg")
    (tmp_path / "mask").mkdir()
    assert len(list(open_source(tmp_path, fps=7.5))) == 1


def test_frames_may_change_size(tmp_path):
    for number in (1, 2):
        Image.fromarray(np.zeros((4, 6 * number, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    assert [frame.shape[1] for frame in open_source(tmp_path)] == [6, 12]


def test_bad_inputs_are_named_before_any_frame_is_used(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4 is neither"):
        open_source(tmp_path / "nowhere.mp4")
    with pytest.raises(ValueError, match="holds no image"):
        open_source(tmp_path)
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    with pytest.raises(ValueError, match=r"text\.mp4 cannot be opened"):
        open_source(text)
    cut = make_video(tmp_path / "cut.mp4", count=30)
    cut.write_bytes(cut.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"cut\.mp4 cannot be opened"):
        open_source(cut)
    Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)).save(tmp_path / "1.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"1\.png"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="frames per second"):
        open_source(tmp_path, fps=0)


def test_video_without_a_frame(tmp_path):
    path = tmp_path / "empty.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()
    with pytest.raises(ValueError, match=r"empty\.avi (holds no frame|cannot be)"):
        open_source(path)


def test_sound_only(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(ValueError, match="no video track"):
        open_source(path)


class FakeCapture:
    """Stands in for cv2.VideoCapture: three frames, then nothing."""

    def __init__(self, index):
        self.index, self.left, self.released = index, 3, False

    def isOpened(self):
        return self.index == 0

    def get(self, prop):
        assert prop == cv2.CAP_PROP_FPS
        return 0.0

    def read(self):
        self.left -= 1
        frame = np.zeros((4, 6, 3), dtype=np.uint8)
        frame[..., 0] = 255  # blue in BGR
        return self.left >= 0, frame

    def release(self):
        self.released = True


@pytest.mark.parametrize("index", [0, "0"])
def test_camera(monkeypatch, index):
    monkeypatch.setattr(cv2, "VideoCapture", FakeCapture)
    with open_source(index) as source:
        frames = list(source)
    assert (source.num_frames, source.fps, source.name) == (None, 15, "camera 0")
    assert [tuple(frame[0, 0]) for frame in frames] == [(0, 0, 255)] * 3


def test_no_such_camera(monkeypatch):
    monkeypatch.setattr(cv2, "VideoCapture", FakeCapture)
    with pytest.raises(FileNotFoundError, match="camera 7 cannot be opened"):
        open_source("7")


def test_an_error_keeps_the_frames_written_so_far(tmp_path):
    path = tmp_path / "v.mp4"
    writer = VideoWriter(path, 10)
    with pytest.raises(KeyboardInterrupt), writer:  # noqa: PT012
        for _ in range(3):
            writer.write(gradient(16, 16))
        raise KeyboardInterrupt
    assert len(list(open_source(path))) == 3


FULL_DISK = """
import resource, signal, sys
import numpy as np
from the_mask.inference.rendering.video_writer import VideoWriter

# Writing past this size fails like a full disk does.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
rng = np.random.default_rng(0)
try:
    with VideoWriter(sys.argv[1], 10) as writer:
        for _ in range(60):
            writer.write(rng.integers(0, 256, (240, 320, 3)).astype(np.uint8))
except OSError as error:
    print("failed:", error)
"""


def test_full_disk_removes_the_unfinished_file_and_keeps_the_old_one(tmp_path):
    path = make_video(tmp_path / "v.mp4", count=2)
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert "failed:" in done.stdout, done
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_writer_refuses_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.mp4"):
        VideoWriter(tmp_path / "v.gif")
    with pytest.raises(ValueError, match="frames per second"):
        VideoWriter(tmp_path / "v.mp4", 0)
    with pytest.raises(ValueError, match="unknown encoder 'nonsense'"):
        VideoWriter(tmp_path / "v.mp4", 5, "nonsense")
    with pytest.raises(ValueError, match="uint8"), VideoWriter(tmp_path / "v.mp4") as w:
        w.write(np.zeros((4, 4)))
    assert not list(tmp_path.iterdir())


def test_the_older_encoder_is_the_fallback(monkeypatch):
    class Codec:
        def __init__(self, name, mode):
            if name != "mpeg4":
                raise av.codec.codec.UnknownCodecError(name)

    assert best_encoder() in video_writer.ENCODERS
    monkeypatch.setattr(video_writer.av.codec, "Codec", Codec)
    assert best_encoder() == "mpeg4"


def test_two_writers_of_one_file(tmp_path):
    """The second one would write into the same partial file."""
    path, frame = tmp_path / "a.mp4", np.zeros((16, 16, 3), np.uint8)
    with VideoWriter(path) as first:
        first.write(frame)
        second = VideoWriter(path)
        with pytest.raises(ValueError, match=r"a\.mp4 is being written by another process"):
            second.write(frame)
        second.close()
        first.write(frame)
    with VideoWriter(path) as third:
        third.write(frame)
    with open_source(path) as source:
        assert len(list(source.timed())) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
