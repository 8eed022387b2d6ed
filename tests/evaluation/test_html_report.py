"""Reports: figures are the evaluator's, curves and worst frames those of a slow count, text of others is escaped."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from the_mask.cli import run_command
from the_mask.data import register_video_tree
from the_mask.evaluation import evaluate_predictions
from the_mask.evaluation.html import ReportSink, page, write_report

H, W = 24, 32
CLASSES = ["road", "<b>car</b>", "sky & clouds"]


@pytest.fixture
def dataset(tmp_path):
    """Two videos of five frames, and two folders of predictions: the second flickers in one frame of video b."""
    rng = np.random.default_rng(0)
    for video in ("a", "b"):
        truth = np.zeros((H, W), np.uint8)
        truth[:8] = 2
        truth[12:20, 4:14] = 1
        truth[23] = 255
        for t in range(5):
            for folder in (f"data/{video}/origin", f"data/{video}/mask", f"../one/{video}", f"../two/{video}"):
                (tmp_path / "tree" / folder).mkdir(parents=True, exist_ok=True)
            frame = rng.integers(0, 255, (H, W, 3), dtype=np.uint8)
            Image.fromarray(frame).save(tmp_path / f"tree/data/{video}/origin/{t}.png")
            Image.fromarray(truth).save(tmp_path / f"tree/data/{video}/mask/{t}.png")
            good = np.where(truth == 255, 0, truth)
            wrong = good.copy()
            if (video, t) == ("b", 3):
                wrong[12:20, 4:14] = 0
            Image.fromarray(good).save(tmp_path / f"one/{video}/{t}.png")
            Image.fromarray(wrong).save(tmp_path / f"two/{video}/{t}.png")
    (tmp_path / "tree/val.txt").write_text("a\nb\n")
    register_video_tree("report_<i>val", tmp_path / "tree", "val", CLASSES)
    return tmp_path


def collect(folder, name, pictures=3):
    sink = ReportSink("report_<i>val", name, pictures)
    results = evaluate_predictions(folder, "report_<i>val", train_ids=True, progress=False, sinks=[sink])
    return sink.report(results["sem_seg"]), results["sem_seg"]


def test_what_is_collected(dataset):
    run, figures = collect(dataset / "two", "two")
    assert run.figures == figures
    car = 8 * 10
    labelled = H * W - W
    # The confusion of all frames, counted by hand: one frame's cars were taken for road.
    assert run.confusion[1, 0] == car
    assert run.confusion[1, 1] == 9 * car
    assert run.confusion.sum() == 10 * labelled
    notes = run.curves["b"]
    assert [note.name for note in notes] == ["0", "1", "2", "3", "4"]
    assert notes[0].flicker is None
    assert [note.flicker for note in notes[1:]] == [0.0, 0.0, car / (H * W), car / (H * W)]
    road = labelled - 8 * W - car
    assert notes[3].miou == pytest.approx((1 + 0 + road / (road + car)) / 3)
    assert [note.miou for note in run.curves["a"]] == [1.0] * 5
    assert [(frame.video, frame.frame) for frame in run.worst] == [("b", "3")]
    assert {(frame.video, frame.frame) for frame in run.flickers} == {("b", "3"), ("b", "4")}
    assert set(run.worst[0].pictures) == {"frame", "prediction", "ground truth", "wrong pixels"}
    # Cars were taken for road, and came back.
    assert [frame.classes for frame in [*run.worst, *run.flickers]] == [[0, 1]] * 3


def test_only_the_worst_are_kept(dataset):
    run, _ = collect(dataset / "two", "two", pictures=1)
    assert len(run.flickers) == 1
    assert run.flickers[0].frame == "3"  # the first of equals
    none, _ = collect(dataset / "two", "two", pictures=0)
    assert none.worst == none.flickers == []


class Page(HTMLParser):
    """Tags that are open and text, as a browser would see them."""

    VOID = ("meta", "img", "br", "polyline", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.links, self.texts = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "action") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.VOID:  # <polyline/>
            return
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page(dataset):
    runs = [collect(dataset / name, f"{name} <script>alert(1)</script>")[0] for name in ("one", "two")]
    path = write_report(dataset / "out" / "report.html", runs)
    text = path.read_text(encoding="utf-8")
    read = Page(text)
    # Names are text, not markup; the only script is the page's own.
    assert read.seen.count("script") == 1
    assert "b" not in read.seen
    assert "i" not in read.seen
    assert "<b>car</b>" in read.texts
    # Everything is in the file.
    assert all(link.startswith("data:image/jpeg;base64,") for link in read.links)
    assert not re.search(r"https?://", text)
    assert "100.00" in read.texts
    assert any(re.fullmatch(r"-\d+\.\d\d", part) for part in read.texts)  # the car's IoU has fallen
    assert "polyline" in read.seen
    assert len(text) < 1 << 20


def test_bad_input(dataset, capsys):
    run, _ = collect(dataset / "one", "one")
    with pytest.raises(ValueError, match="at least one run"):
        write_report(dataset / "r.html", [])
    with pytest.raises(ValueError, match="two runs have one name: one, one"):
        write_report(dataset / "r.html", [run, run])
    with pytest.raises(ValueError, match="nowhere"):
        ReportSink("nowhere", "run")
    # Before the evaluation, not after it.
    (dataset / "file").touch()
    for words in (["report", "--output"], ["evaluate", "--report"], ["evaluate", "--json"]):
        command = [words[0], "--pred", "x", "--dataset", "report_<i>val", words[1], str(dataset / "file" / "r.html")]
        assert run_command(command[0], command[1:]) == 1
        assert "cannot be written" in capsys.readouterr().err
    arguments = ["--dataset", "report_<i>val", "--pred", str(dataset / "one"), "--output"]
    assert run_command("report", [*arguments, str(dataset / "r.pdf")]) == 1
    assert "expected the name of an .html file" in capsys.readouterr().err
    assert run_command("report", [*arguments, str(dataset / "r.html")]) == 0
    assert (dataset / "r.html").is_file()


def test_lines_break_where_there_is_no_value():
    from the_mask.evaluation.html.collect import FrameNote

    notes = [FrameNote(str(i), value, None) for i, value in enumerate([0.0, 1.0, None, 0.5])]
    assert page._line(notes, "miou", 1.0) == ["0.0,90.0 200.0,0.0", "600.0,45.0"]
