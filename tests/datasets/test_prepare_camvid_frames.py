"""``prepare_camvid.py --frames`` on synthetic videos whose frames are known, aligned, shifted, cut and mixed up."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from the_mask.data import ClipMapper, get_records, register_all
from the_mask.data.source_frames import alignment_problem, consecutive_runs, memory_numbers, psnr, walk_video

SCRIPT = Path(__file__).resolve().parents[2] / "datasets" / "prepare_camvid.py"
HEIGHT, WIDTH = 32, 48
# Labelled frames per split, and where the specification says that they are in the videos.
LABELLED = {
    "train": ["0016E5_00010", "0016E5_00020", "0001TP_006690"],
    "val": ["0016E5_00030", "0016E5_00032", "0016E5_00034"],
}
INDEX = {"0016E5_00010": 11, "0016E5_00020": 21, "0016E5_00030": 31, "0016E5_00032": 33, "0016E5_00034": 35}
INDEX |= {"0001TP_006690": 30}


def picture(video: str, index: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Frame ``index`` of a video: a smooth texture that moves by two pixels per frame."""
    rng = np.random.default_rng(sum(video.encode()))
    texture = ndimage.gaussian_filter(rng.uniform(0, 255, (HEIGHT, WIDTH + 200, 3)), (2, 2, 0))
    texture = (texture - texture.min()) / np.ptp(texture) * 255
    return cv2.resize(texture[:, 2 * index : 2 * index + WIDTH].astype(np.uint8), (width, height))


def nearest(frame: np.ndarray, video: str) -> int:
    """Index of the picture of a video that a frame is most like."""
    return min(range(40), key=lambda index: np.abs(frame.astype(float) - picture(video, index)).mean())


def write_video(path: Path, video: str, indices: range) -> None:
    """An MPEG-4 file at good quality, twice as large as the release's images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30, options={"qscale": "2"})
        stream.width, stream.height, stream.pix_fmt = 2 * WIDTH, 2 * HEIGHT, "yuv420p"
        for index in indices:
            frame = av.VideoFrame.from_ndarray(picture(video, index, 2 * HEIGHT, 2 * WIDTH), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def release(tmp_path: Path) -> Path:
    source = tmp_path / "release"
    for split, stems in LABELLED.items():
        for stem in stems:
            image = picture(stem.split("_")[0], INDEX[stem])
            for folder, array in ((split, image), (f"{split}annot", np.full((HEIGHT, WIDTH), 3, np.uint8))):
                (source / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(source / folder / f"{stem}.png")
    return source


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    write_video(tmp_path / "videos/0016E5.avi", "0016E5", range(40))
    write_video(tmp_path / "videos/01TP_extract.AVI", "0001TP", range(36))
    return tmp_path / "videos"


def run(*words: object) -> int:
    return runpy.run_path(str(SCRIPT))["main"]([str(word) for word in words])


def test_frames_are_decoded_and_found_by_the_mapper(
    release: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "data"
    assert run("--source", release, "--frames", videos, "--memory", 2, "--output", root / "camvid_frames") == 0
    assert "0016E5: 0016E5.avi is aligned" in capsys.readouterr().out
    register_all(root)
    try:
        train, val = get_records("camvid_frames_train"), get_records("camvid_frames_val")
    finally:
        register_all()
    found = {record["video_id"]: [frame["frame_id"] for frame in record["frames"]] for record in train + val}
    assert found == {
        "0001TP_006688": ["0001TP_006688", "0001TP_006689", "0001TP_006690"],
        "0016E5_00008": ["0016E5_00008", "0016E5_00009", "0016E5_00010"],
        "0016E5_00018": ["0016E5_00018", "0016E5_00019", "0016E5_00020"],
        "0016E5_00028": [f"0016E5_{number:05d}" for number in range(28, 35)],
    }
    labelled = [f["frame_id"] for record in train + val for f in record["frames"] if f["sem_seg_file_name"]]
    assert sorted(labelled) == sorted(stem for stems in LABELLED.values() for stem in stems)
    # A decoded frame is the picture of its own number.
    decoded = np.array(Image.open(val[0]["frames"][1]["file_name"]))
    assert decoded.shape == (HEIGHT, WIDTH, 3)
    assert nearest(decoded, "0016E5") == 30
    mapper = ClipMapper(
        is_train=True,
        label_tables={"camvid_frames_train": range(12)},
        dilations=[-2, -1],
        boundary="drop",
    )
    clip = mapper(train[1], seed=0)
    assert list(clip.frame_ids) == found[train[1]["video_id"]]
    assert [label is not None for label in clip.labels] == [False, False, True]


def test_a_video_that_starts_late_is_refused_and_mended_by_a_shift(
    release: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_video(videos / "0016E5.avi", "0016E5", range(2, 40))
    output = tmp_path / "out"
    words = ("--source", release, "--frames", videos, "--memory", 2, "--output", output)
    assert run(*words) == 1
    error = capsys.readouterr().err
    assert "5 of 5 labelled images are more like another frame of the video than their own; e.g. frame 10: " in error
    assert "dB at offset -2" in error
    assert "pass --shift 0016E5=-2" in error
    assert not output.exists()
    assert not list(tmp_path.glob("*.partial*"))
    assert run(*words, "--shift", "0016E5=-2") == 0
    first = next((output / "val").iterdir()) / "origin/0016E5_00029.png"
    assert nearest(np.array(Image.open(first)), "0016E5") == 30


def test_bad_videos_are_named(release: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ("--source", release, "--frames", videos, "--output", tmp_path / "out")

    def message(*more: object) -> str:
        assert run(*words, *more) == 1
        return capsys.readouterr().err

    write_video(videos / "0016E5.avi", "0016E5", range(33))
    assert "the video does not reach 2 labelled frames, the first is 32" in message()
    write_video(videos / "0016E5.avi", "0001TP", range(40))
    text = message()
    assert "more like another frame" in text or "does not fit" in text
    write_video(videos / "0016E5_b.mp4", "0016E5", range(40))
    assert "several videos of 0016E5: 0016E5.avi, 0016E5_b.mp4" in message()
    (videos / "0016E5.avi").unlink()
    (videos / "0016E5_b.mp4").write_bytes(b"no video")
    assert "0016E5_b.mp4 cannot be opened" in message()
    (videos / "0016E5_b.mp4").unlink()
    assert "has no video of 0016E5 (0016E5*{.mxf," in message()
    assert "--memory 0: expected at least 1" in message("--memory", 0)
    assert "--shift 0017: expected one of" in message("--shift", "0017=1")
    assert run("--source", release, "--frames", tmp_path / "none", "--output", tmp_path / "out") == 1
    assert "takes the folder of the source videos" in capsys.readouterr().err


def test_psnr() -> None:
    zero, one = np.zeros((4, 5, 3), np.uint8), np.full((4, 5, 3), 10, np.uint8)
    assert psnr(zero, one) == pytest.approx(20 * math.log10(25.5))
    assert psnr(one, one) == math.inf


def test_numbers() -> None:
    assert memory_numbers([1, 6, 8], 3) == [0, 3, 4, 5, 7]
    assert consecutive_runs([5, 3, 4, 9, 4]) == [[3, 4, 5], [9]]


def test_alignment_rules(tmp_path: Path) -> None:
    assert alignment_problem({7: {-1: 20.0, 0: 20.0, 1: 20.0}}) == ("", None)  # a still scene
    problem, mend = alignment_problem({7: {0: 20.0, 1: 30.0}, 8: {0: 25.0, 1: 21.0}})
    assert problem.startswith("1 of 2 labelled images")
    assert mend is None  # no single shift explains it
    path = tmp_path / "7.png"
    Image.fromarray(picture("x", 7)).save(path)
    taken: list[int] = []

    def frames():
        for index in range(100):
            taken.append(index)
            yield picture("x", index)

    handed: list[int] = []
    scores = walk_video(frames(), 0, {7: path}, [3], lambda number, _: handed.append(number))
    assert scores[7][0] == math.inf
    assert sorted(scores[7]) == list(range(-3, 4))
    assert handed == [3]
    assert taken[-1] == 10  # no more is decoded than is needed
