"""The manifest of an archive and its results: what is wrong is named by file and line."""

import json
import os
from pathlib import Path

import pytest
from archive_cases import MODEL, InlineWorkers, make_frames, opened, records, setup_for, write_manifest

from the_mask.cli import _archive
from the_mask.inference.archive import ENGINES, Results, VideoOptions, read_manifest, segment_archive
from the_mask.inference.archive.manifest import output_kind
from the_mask.inference.archive.results import DONE, FAILED


def test_a_manifest(tmp_path):
    path = write_manifest(
        tmp_path / "videos.jsonl",
        [
            {"video": "cam1/a.mp4", "output": "cam1/a.mp4"},
            "\n",
            {"video": "/data/b.mp4", "output": ["b", "b.json"], "options": {"fps": 12.5, "palette": True}},
            {"video": "https://host/c.mp4", "output": "c/", "options": {"max_frames": 3, "legend": False}},
        ],
    )
    tasks = read_manifest(path, VideoOptions(alpha=0.3))
    assert [task.line for task in tasks] == [1, 3, 4]
    assert [task.video for task in tasks] == [str(tmp_path / "cam1/a.mp4"), "/data/b.mp4", "https://host/c.mp4"]
    assert [task.outputs for task in tasks] == [("cam1/a.mp4",), ("b", "b.json"), ("c",)]
    assert tasks[0].options == VideoOptions(alpha=0.3)
    assert tasks[1].options == VideoOptions(alpha=0.3, fps=12.5, palette=True)
    assert len({task.key for task in tasks}) == 3
    assert [output_kind(name) for name in ("x/y", "x.json", "x.MKV")] == ["labels", "shares", "video"]


GOOD = {"video": "a.mp4", "output": "a.mp4"}
BAD = [
    ('{"video": "a.mp4", "output": \n', "not JSON: Expecting value at column 30"),
    ('{"video": "a", "video": "b", "output": "x"}\n', "key 'video' is given twice"),
    ("[" * 100_000 + "\n", "nested too deep"),
    ('["a.mp4", "b.mp4"]\n', "a line holds an object"),
    ({"video": "b.mp4"}, '"output" is null: expected a name in the output folder'),
    ({"output": "b.mp4"}, '"video" is null'),
    ({"video": 3, "output": "b.mp4"}, '"video" is 3'),
    ({"video": "b", "output": ["x", 4]}, '"output" is ["x", 4]'),
    ({"video": "b", "output": "b", "fps": 3}, "unknown key 'fps': expected video, output, options"),
    ({"video": "b", "output": "b", "options": []}, '"options" is []: expected an object'),
    ({"video": "b", "output": "b", "options": {"rate": 3}}, "unknown option 'rate'"),
    ({"video": "b", "output": "b", "options": {"fps": 0}}, "option fps is 0: expected frames per second above 0"),
    ({"video": "b", "output": "b", "options": {"alpha": True}}, "option alpha is true: expected a number from 0 to 1"),
    ({"video": "b", "output": "b", "options": {"max_frames": 1.0}}, "option max_frames is 1.0"),
    ({"video": "b", "output": "b", "options": {"audio": "mp3"}}, 'option audio is "mp3": expected one of copy, drop'),
    ({"video": "b", "output": "/etc/b.mp4"}, "is an absolute path"),
    ({"video": "b", "output": "../b.mp4"}, "leads out of its folder by '..'"),
    ({"video": "b", "output": "b.gif"}, "expected a name that ends in .mp4"),
    ({"video": "b", "output": "b.mp4/"}, "is a folder of label PNGs: leave its suffix out"),
    ({"video": "b", "output": ["b.mp4", "c.mp4"]}, "one video at a time"),
    ({"video": "b", "output": "results.jsonl"}, "this name is used by the run itself"),
    ({"video": "b", "output": "results.jsonl/x"}, "this name is used by the run itself"),
    ({"video": "b", "output": "./a.mp4"}, "output 'a.mp4' is that of line 1 too"),
    ({"video": "b", "output": ["b", "b"]}, "output 'b' is that of line 2 too"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=range(len(BAD)))
def test_a_broken_line_is_named(tmp_path, line, message):
    path = write_manifest(tmp_path / "videos.jsonl", [GOOD, line])
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_manifest(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"manifest {path}, line 2: ")


def test_other_faults_of_manifests(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest .*none\.jsonl does not exist"):
        read_manifest(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="has no line"):
        read_manifest(write_manifest(tmp_path / "empty.jsonl", ["\n"]))
    nested = write_manifest(tmp_path / "n.jsonl", [{"video": "b", "output": "x/y.json"}, {"video": "b", "output": "x"}])
    with pytest.raises(ValueError, match=r"line 1: output 'x/y\.json' lies in output 'x' of line 2"):
        read_manifest(nested)


@pytest.fixture
def archive(tmp_path):
    manifest = write_manifest(tmp_path / "videos.jsonl", [{"video": name, "output": name} for name in ("a", "b")])
    return tmp_path / "out", manifest


def finish(folder, results, task):
    for name in task.outputs:
        make_frames(folder / name)
    results.add(task, DONE, {"frames": 3})


def test_results_go_on(archive):
    folder, manifest = archive
    tasks, results = opened(folder, manifest)
    assert not any(map(results.done, tasks))
    finish(folder, results, tasks[0])
    results.add(tasks[1], FAILED, {"error": "damaged"})
    (folder / ".1234.writing" / "0").mkdir(parents=True)
    _, again = opened(folder, manifest)
    assert list(map(again.done, tasks)) == [True, False]
    assert sorted(path.name for path in folder.iterdir()) == ["a", "results.jsonl"]
    (folder / "a").rename(folder / "elsewhere")
    assert not again.done(tasks[0])


def test_other_options_are_other_results(archive):
    """Also when they are changed back: the outputs are of the last options."""
    folder, manifest = archive
    first, results = opened(folder, manifest)
    finish(folder, results, first[0])
    second = read_manifest(manifest, VideoOptions(palette=True))
    assert not results.done(second[0])
    results.add(second[0], DONE, {})
    assert results.done(second[0])
    assert not results.done(first[0])
    assert not opened(folder, manifest)[1].done(first[0])


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_that_was_cut_off_is_done_again(archive, cut):
    folder, manifest = archive
    tasks, results = opened(folder, manifest)
    finish(folder, results, tasks[0])
    whole = results.path.read_bytes()
    results.path.write_bytes(whole[:-cut])
    _, again = opened(folder, manifest)
    assert not again.done(tasks[0])
    again.add(tasks[0], DONE, {"frames": 3})
    assert results.path.read_bytes() == whole


def test_what_cannot_be_resumed_is_named(archive):
    folder, manifest = archive
    folder.mkdir()
    (folder / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"holds mine\.txt and no results\.jsonl"):
        opened(folder, manifest)
    (folder / "mine.txt").unlink()
    tasks, results = opened(folder, manifest)
    finish(folder, results, tasks[0])
    with pytest.raises(ValueError, match=r"another model \(model, weights differ\)"):
        Results(folder, {"model": "other", "weights": "1"})
    lines = results.path.read_text().splitlines(keepends=True)
    deep = "[" * 100_000 + "\n"
    record = '{"task": "x", "status": "done", "output": %s}\n'
    kinds = [record % output for output in ("5", "null", '{"a": 1}', "[[1]]", '[["a"]]')]
    for number, damage in (
        *((1, "{}\n"), (2, "{]\n"), (2, deep), (2, "3\n"), (2, '{"task": "x"}\n')),
        *((2, kind) for kind in kinds),
        (2, '{"task": [1], "status": "done", "output": ["a"]}\n'),
    ):
        results.path.write_text("".join([*lines[: number - 1], damage, *lines[number:]]))
        with pytest.raises(ValueError, match=rf"results\.jsonl, line {number}: "):
            opened(folder, manifest)


def test_names_that_are_not_utf8(tmp_path):
    """A file's name may have any bytes: a video of such a name is segmented and known again; no output has one."""
    make_frames(Path(os.fsdecode(os.fsencode(tmp_path) + b"/v\xff")))
    manifest = write_manifest(tmp_path / "m.jsonl", [{"video": "v\udcff", "output": "o.json"}])
    for before in (0, 1):
        tasks, results = opened(tmp_path / "out", manifest)
        workers = InlineWorkers(setup_for(tmp_path / "out"))
        summary = segment_archive(tasks, results, workers, progress=False)
        assert (summary.done, summary.before) == (1 - before, before)
    assert results.path.read_bytes().endswith(b"}\n")
    for video, output in (("v", "a\udcff"), ("v\ud800", "a"), ("v\0", "a")):
        write_manifest(tmp_path / "m.jsonl", [{"video": video, "output": output}])
        with pytest.raises(ValueError, match=r"m\.jsonl, line 1: "):
            read_manifest(tmp_path / "m.jsonl")


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(FileExistsError, match="out"):
        Results(tmp_path / "out", MODEL)


def test_records_are_lines_of_json(archive):
    folder, manifest = archive
    tasks, results = opened(folder, manifest)
    finish(folder, results, tasks[0])
    assert json.loads(results.path.read_text().splitlines()[0]) == {"results": "the-mask segment", "model": "toy"}
    (record,) = records(folder)
    assert record == {
        "video": tasks[0].video,
        "output": ["a"],
        "status": "done",
        "frames": 3,
        "task": tasks[0].key,
    }


def test_literal_engines_are_those_of_the_library():
    assert _archive.ENGINES == ENGINES
