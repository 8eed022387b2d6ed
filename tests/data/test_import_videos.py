"""Importing with frames out of videos: every labelled frame gets the picture of its own number, and nothing is lost."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest
from importer_fixtures import NAMES, H, W, check, encoded, truth
from PIL import Image

from the_mask.cli import run_command
from the_mask.cli.import_ import open_video
from the_mask.data.classes import make_class_list
from the_mask.data.exporters import FORMATS as EXPORTERS
from the_mask.data.exporters import LabelFrame
from the_mask.data.importers import Sampling, import_dataset

FRAMES, RATE = 12, 6


def shade(number):
    return 10 + 17 * number


def video(path, frames=FRAMES, size=(H, W)):
    """Frame n is of one grey, :func:`shade`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=RATE, options={"level": "3"})
        stream.height, stream.width, stream.pix_fmt = *size, "bgr0"
        for number in range(frames):
            picture = np.full((*size, 3), shade(number), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def shown(output):
    """(video, frame) -> the number that its picture shows."""
    found = {}
    for path in output.glob("data/**/origin/*.png"):
        values = np.asarray(Image.open(path))
        assert values.shape == (H, W, 3)
        assert values.min() == values.max()
        name = path.parent.parent.relative_to(output / "data").as_posix()
        found[name, path.stem] = (int(values[0, 0, 0]) - 10) / 17
    return found


def xml(shapes, head=""):
    labels = "".join(f"<label><name>{name}</name></label>" for name in NAMES)
    return f"""<?xml version="1.0"?><annotations><meta><task><name>drive</name>{head}<labels>{labels}</labels></task>
</meta>{shapes}</annotations>"""


def track(frame, outside=1, after=1):
    """A car box, alone in its frame."""
    points = "4,3;11,3;11,8;4,8"
    return f"""<track id="{frame}" label="car"><polygon frame="{frame}" outside="0" keyframe="1" points="{points}"/>
<polygon frame="{frame + after}" outside="{outside}" keyframe="1" points="{points}"/></track>"""


def car():
    return np.where(truth() == 1, 1, -1)


def names(numbers):
    return {("drive", f"{n:08d}") for n in numbers}


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (None, range(FRAMES)),
        (Sampling(every=5), [0, 3, 5, 8, 10]),
        (Sampling(every=0), [3, 8]),
        (Sampling(fps=Fraction(2)), [0, 3, 6, 8, 9]),
        (Sampling(fps=Fraction(4)), [0, 2, 3, 5, 6, 8, 9, 11]),
        (Sampling(fps=Fraction(100)), range(FRAMES)),
    ],
)
def test_sparse_labels_of_cvat(tmp_path, sampling, kept):
    path = video(tmp_path / "drive.mkv")
    (tmp_path / "a.xml").write_text(xml(track(3) + track(8)))
    out = tmp_path / "out"
    report = import_dataset(
        tmp_path / "a.xml", "cvat-video", out, val_videos=0, video=path, sampling=sampling, open_video=open_video
    )
    check(out, {("drive", "00000003"): car(), ("drive", "00000008"): car()})
    found = shown(out)
    assert found.keys() == names(kept)
    assert all(number == int(name) for (_, name), number in found.items())
    assert (report.frames, report.labelled, report.videos) == (len(list(kept)), 2, 1)
    assert sorted(path.name for path in out.iterdir()) == ["classes.json", "data", "dataset.py", "train.txt"]


def test_validation_has_labelled_frames(tmp_path):
    path = video(tmp_path / "drive.mkv")
    (tmp_path / "a.xml").write_text(xml("".join(track(n) for n in (1, 2, 4, 6))))
    out = tmp_path / "out"
    import_dataset(tmp_path / "a.xml", "cvat-video", out, val_videos=0.3, video=path, open_video=open_video)
    # One of four labelled frames, and what comes after it.
    assert {name for video, name in shown(out) if video == "drive_end"} == {f"{n:08d}" for n in range(6, FRAMES)}
    assert [path.stem for path in out.glob("data/drive_end/mask/*")] == ["00000006"]
    # With a single one nothing is left to validate with.
    (tmp_path / "a.xml").write_text(xml(track(4)))
    import_dataset(tmp_path / "a.xml", "cvat-video", tmp_path / "one", video=path, open_video=open_video)
    assert (tmp_path / "one/train.txt").read_text() == "drive\n"
    assert not (tmp_path / "one/val.txt").exists()


def test_a_task_of_every_third_frame(tmp_path):
    """Polygons hold between the frames of the task, but other frames were never looked at."""
    path = video(tmp_path / "drive.mkv")
    head = "<start_frame>1</start_frame><stop_frame>10</stop_frame><frame_filter>step=3</frame_filter>"
    (tmp_path / "a.xml").write_text(xml(track(3, outside=0, after=7), head))
    out = tmp_path / "out"
    import_dataset(
        tmp_path / "a.xml", "cvat-video", out, val_videos=0, video=path, sampling=Sampling(0), open_video=open_video
    )
    check(out, {("drive", f"{n:08d}"): car() for n in (4, 7, 10)})


def test_names_from_one_and_other_formats(tmp_path):
    """COCO's file names count from 1 here; frames that come out of order are found, too."""
    folder = tmp_path / "videos"
    video(folder / "cam/b.mkv")
    video(folder / "a.MKV")
    images = [("cam/b/img9.jpg", 1), ("cam/b/img2.jpg", 2), ("a/x_12.jpg", 3)]
    content = {
        "images": [{"id": i, "file_name": name, "height": H, "width": W} for name, i in images],
        "categories": [{"id": 1, "name": "road"}, {"id": 2, "name": "car"}],
        "annotations": [
            {"image_id": i, "id": i, "category_id": 2, "segmentation": encoded(truth() == 1)} for i in (1, 2, 3)
        ],
    }
    (tmp_path / "c.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    words = [str(tmp_path / "c.json"), "--format", "coco", "--output", str(out), "--video", str(folder), "--val", "0"]
    assert run_command("import", [*words, "--every", "0", "--first-frame", "1"]) == 0
    check(out, {("cam/b", "00000002"): car(), ("cam/b", "00000009"): car(), ("a", "00000012"): car()})
    assert shown(out) == {("cam/b", "00000002"): 1, ("cam/b", "00000009"): 8, ("a", "00000012"): 11}


def test_unlabelled_videos(tmp_path, capsys):
    video(tmp_path / "v/a.mkv")
    video(tmp_path / "v/b.mkv", 4)
    words = [str(tmp_path / "v"), "--format", "video", "--output", str(tmp_path / "out"), "--every", "3"]
    assert run_command("import", words) == 1
    assert "name the classes (--classes), which a video does not do" in capsys.readouterr().err
    assert run_command("import", [*words, "--classes", "road,car"]) == 0
    assert "2 videos, 6 frames, 0 of them labelled" in capsys.readouterr().out
    found = shown(tmp_path / "out")
    assert found == {("a", f"{n:08d}"): n for n in (0, 3, 6, 9)} | {("b", f"{n:08d}"): n for n in (0, 3)}
    check(tmp_path / "out", {})


def test_masks_that_the_library_wrote(tmp_path):
    """What `the-mask segment` wrote, perhaps corrected by hand, goes back in with the video's own frames."""
    path = video(tmp_path / "drive.mkv")
    for number in (2, 4):
        (tmp_path / "labels").mkdir(exist_ok=True)
        values = np.where(truth() < 0, 255, truth()).astype(np.uint8)
        Image.fromarray(values).save(tmp_path / f"labels/{number:08d}.png")
    out = tmp_path / "out"
    words = [str(tmp_path / "labels"), "--format", "ids", "--classes", "road,car", "--output", str(out), "--val", "0"]
    assert run_command("import", [*words, "--video", str(path), "--every", "6"]) == 0
    check(out, {("labels", "00000002"): truth(), ("labels", "00000004"): truth()})
    assert set(shown(out).values()) == {0, 2, 4, 6}


@pytest.mark.parametrize("form", ["coco", "ytvis", "cvat-masks", "cvat-video", "label-studio", "panoptic"])
def test_what_was_exported_comes_back_with_the_video(tmp_path, form):
    """Every second frame is labelled by the library, goes out to a tool, and comes back without a folder of frames."""
    path = video(tmp_path / "drive.mkv")
    classes = make_class_list(NAMES)
    exporter = EXPORTERS[form](tmp_path / "out", classes)
    given = {}
    for number in range(0, FRAMES, 2):
        name = exporter.frame_name.format(number)
        labels = np.where(truth() < 0, 255, truth())
        labels[number % H, 1 + number] = 0
        given["drive", f"{number:08d}"] = np.where(labels == 255, -1, labels)
        exporter.write(LabelFrame("drive", name, labels.astype(np.uint8), f"drive/{name}.png"))
    exporter.close()
    options = {}
    source = tmp_path / "out" / {"cvat-masks": "drive.zip", "cvat-video": "drive.xml"}.get(form, "drive.json")
    if form == "ytvis":
        source = tmp_path / "out/annotations.json"
    if form == "label-studio":
        tasks = json.loads((tmp_path / "out/tasks.json").read_text())
        source = tmp_path / "drive.json"
        # A person accepts the predictions; the server has moved the pictures.
        accepted = [{**task, "annotations": [{"result": task["predictions"][0]["result"]}]} for task in tasks]
        source.write_text(json.dumps(accepted))
        options["names"] = NAMES
    back = tmp_path / "back"
    report = import_dataset(
        source, form, back, val_videos=0, options=options, video=path, sampling=Sampling(0), open_video=open_video
    )  # fmt: skip
    check(back, given)
    assert set(shown(back).values()) == set(range(0, FRAMES, 2))
    assert report.labelled == FRAMES // 2


def test_bad_input(tmp_path, capsys):
    path = video(tmp_path / "drive.mkv", 5)
    source, out = tmp_path / "a.xml", tmp_path / "out"

    def fails(message, *words, shapes=""):
        source.write_text(xml(shapes or track(3)))
        assert run_command("import", [str(source), "--format", "cvat-video", "--output", str(out), *words]) == 1
        error = capsys.readouterr().err
        assert message in error, error
        assert not out.exists()
        assert not list(tmp_path.glob("*.partial*"))

    fails("holds no numbered frames")
    fails("frames are sampled from a video, and none is given", "--every", "2")
    fails(f"{tmp_path / 'no.mkv'} does not exist", "--video", str(tmp_path / "no.mkv"))
    fails("not from both", "--video", str(path), "--frames", str(tmp_path))
    fails("--every 2 and --fps 3: give one of them", "--video", str(path), "--every", "2", "--fps", "3")
    fails("expected 0 or more", "--video", str(path), "--every", "-1")
    fails("frames per second 0.0", "--video", str(path), "--fps", "0")
    fails(
        f"a.xml, frame 7: frame 7, but {path} ends with frame 4", "--video", str(path), shapes=track(1) + track(7)
    )  # fmt: skip
    (tmp_path / "broken.mkv").write_bytes(path.read_bytes()[:200])
    fails("broken.mkv", "--video", str(tmp_path / "broken.mkv"))
    small = video(tmp_path / "small.mkv", 5, (H, W + 2))
    labels = tmp_path / "labels"
    labels.mkdir()
    Image.fromarray(np.zeros((H, W), np.uint8)).save(labels / "3.png")
    words = [str(labels), "--format", "ids", "--classes", "road", "--output", str(out), "--video"]
    assert run_command("import", [*words, str(small)]) == 1
    assert "is 12x22 (height x width) but mask annotation of 00000003.png is 12x20" in capsys.readouterr().err
    Image.fromarray(np.zeros((H, W), np.uint8)).save(labels / "name.png")
    assert run_command("import", [*words, str(path)]) == 1
    assert "name.png: frame name.png has no number at its end" in capsys.readouterr().err
    (labels / "name.png").unlink()
    (tmp_path / "videos").mkdir()
    assert run_command("import", [*words, str(tmp_path / "videos")]) == 1
    assert "3.png" in capsys.readouterr().err
