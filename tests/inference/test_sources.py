"""Sources: timestamps, damage, seeking, URLs."""

import functools
import http.server
import threading

import numpy as np
import pytest
from PIL import Image
from stream_cases import encode, number_of, picture, write_video

from the_mask.inference.live import sources
from the_mask.inference.live.sources import open_source


def test_times_of_a_variable_rate(tmp_path):
    times = [0, 0.1, 0.15, 0.9, 1.0, 3.5]
    path = tmp_path / "vfr.mkv"
    path.write_bytes(encode([picture(i) for i in range(6)], times, kind="matroska"))
    with open_source(path) as source:
        frames = list(source.timed())
    assert [frame.seconds for frame in frames] == pytest.approx(times, abs=2e-3)
    assert [number_of(frame.image) for frame in frames] == list(range(6))


def test_folders_and_plain_frames_count_their_time(tmp_path):
    for number in range(3):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.png")
    with open_source(tmp_path, fps=4) as source:
        assert [frame.seconds for frame in source.timed()] == [0, 0.25, 0.5]
        assert not source.live


def test_resolution_change(tmp_path):
    path = tmp_path / "two.ts"
    path.write_bytes(
        encode([picture(i) for i in range(4)], kind="mpegts")
        + encode([picture(i, (96, 64)) for i in range(3)], kind="mpegts")
    )
    with open_source(path) as source:
        assert [frame.shape[:2] for frame in source] == [(48, 64)] * 4 + [(96, 64)] * 3


def damaged(path, share=(0.5, 0.6)):
    """A video of 40 noisy frames with rubbish in part of its data."""
    rng = np.random.default_rng(0)
    noisy = [rng.integers(0, 60, (48, 64, 3)).astype(np.uint8) + picture(0) for _ in range(40)]
    data = bytearray(encode(noisy, gop=8))
    start, stop = data.index(b"mdat") + 4, data.rindex(b"moov") - 4
    first, last = (start + round(x * (stop - start)) for x in share)
    data[first:last] = rng.integers(0, 256, last - first).astype(np.uint8).tobytes()
    path.write_bytes(data)
    return path


def test_damage_is_reported_and_skipped(tmp_path):
    path = damaged(tmp_path / "damaged.mp4")
    problems = []
    with open_source(path, on_problem=problems.append) as source:
        frames = list(source.timed())
    assert problems
    assert all("damaged.mp4" in text for text in problems)
    assert 20 < len(frames) <= 40, "what is whole is still shown"
    times = [frame.seconds for frame in frames]
    assert times[-1] == pytest.approx(3.9, abs=0.01), "up to the end"
    assert times == sorted(times)


def test_damaged_packets_raise_without_a_listener(tmp_path):
    with (
        open_source(damaged(tmp_path / "cut.mp4")) as source,
        pytest.raises(ValueError, match=r"cut\.mp4 cannot be decoded after frame \d+"),
    ):
        list(source)


def test_a_source_of_rubbish_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BAD_PACKETS", 3)
    problems = []
    with (
        open_source(damaged(tmp_path / "rubbish.mp4", (0.3, 0.9)), on_problem=problems.append) as source,
        pytest.raises(ValueError, match=r"rubbish\.mp4 cannot be decoded after frame"),
    ):
        list(source)
    assert len(problems) >= 2


def test_an_image_that_cannot_be_read_is_skipped(tmp_path):
    for number in range(3):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    problems = []
    with open_source(tmp_path, on_problem=problems.append) as source:
        assert [frame.seconds for frame in source.timed()] == pytest.approx([0, 2 / 15])
    assert len(problems) == 1
    assert "1.png" in problems[0]
    with pytest.raises(ValueError, match=r"1\.png"):
        list(open_source(tmp_path))


@pytest.mark.parametrize("name", ["empty.mp4", "empty.avi"])
def test_zero_length_file(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"{name} is empty \(0 bytes\)"):
        open_source(tmp_path / name)


def test_seek_in_a_video(tmp_path):
    path = write_video(tmp_path / "v.mp4", 30, gop=7)
    with open_source(path) as source:
        frames = source.timed()
        assert [number_of(next(frames).image) for _ in range(5)] == [0, 1, 2, 3, 4]
        for target in (17, 3, 28, 0):
            source.seek(target / 10)
            found = [next(frames) for _ in range(2)]
            assert [number_of(f.image) for f in found] == [target, target + 1]
            assert [f.seconds for f in found] == pytest.approx([target / 10, target / 10 + 0.1])
        with pytest.raises(ValueError, match=r"seek to -1 s; expected 0 or more"):
            source.seek(-1)


def test_seek_in_a_folder(tmp_path):
    for number in range(6):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.png")
    with open_source(tmp_path, fps=2) as source:
        frames = source.timed()
        next(frames)
        source.seek(2.0)
        assert [number_of(frame.image) for frame in frames] == [4, 5]


@pytest.fixture
def server(tmp_path):
    """Serves ``tmp_path`` over HTTP on this machine."""
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=tmp_path)) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_network_url(tmp_path, server):
    write_video(tmp_path / "v.mkv", 5, kind="matroska")
    with open_source(f"{server}/v.mkv") as source:
        assert [number_of(frame) for frame in source] == [0, 1, 2, 3, 4]
        assert not source.live
    with pytest.raises(ValueError, match=r"nowhere\.mkv cannot be opened: nothing answers there, or no video: [^\[]*$"):
        open_source(f"{server}/nowhere.mkv")
    with pytest.raises(ValueError, match="cannot be opened: nothing answers there"):
        open_source("rtsp://127.0.0.1:9/none")
