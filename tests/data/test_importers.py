"""Importers: every format, from a fixture of the format's real shape, comes out pixel for pixel."""

import csv
import json
import zipfile
from itertools import pairwise

import numpy as np
import pytest
from importer_fixtures import COLORS, NAMES, H, W, check, color_mask, encoded, picture, segments_png, truth
from PIL import Image

from the_mask.cli import import_, run_command
from the_mask.data.importers import FORMATS, import_dataset, writer
from the_mask.data.importers.shapes import decode_brush


def test_color_masks(tmp_path):
    for video in ("a", "b"):
        picture(tmp_path / "frames" / video / "1.jpg")
        (tmp_path / "masks" / video).mkdir(parents=True)
        Image.fromarray(color_mask(truth())).save(tmp_path / "masks" / video / "1.png")
    with open(tmp_path / "classes.csv", "w", newline="") as file:
        csv.writer(file).writerows([["class", "r", "g", "b"], *zip(NAMES, *zip(*COLORS)), ["void", 0, 0, 0]])
    out = tmp_path / "colors_out"
    report = import_dataset(tmp_path / "masks", "colors", out, options={"table": tmp_path / "classes.csv"})
    classes = check(out, {("a", "1"): truth(), ("b", "1"): truth()})
    assert classes["names"] == NAMES
    assert [tuple(color) for color in classes["colors"]] == COLORS
    assert (report.videos, report.frames, report.labelled) == (2, 2, 2)
    assert (out / "train.txt").read_text() == "a\n"
    assert (out / "val.txt").read_text() == "b\n"
    assert (out / "data/a/origin/1.jpg").read_bytes() == (tmp_path / "frames/a/1.jpg").read_bytes()

    broken = color_mask(truth())
    broken[0, 0] = 1, 2, 3
    Image.fromarray(broken).save(tmp_path / "masks/a/1.png")
    with pytest.raises(ValueError, match=r"a.1.png: colour \(1, 2, 3\) \(1 pixels\) is not in the table"):
        import_dataset(tmp_path / "masks", "colors", tmp_path / "x", options={"table": tmp_path / "classes.csv"})


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ({"a": 10, "b": 10}, 0.2, {"b"}),
        ({str(i): 10 for i in range(10)}, 0.2, {"8", "9"}),
        ({"a": 10, "b": 300}, 0.2, {"a"}),  # the last one is the only long one
        ({"a": 300, "b": 10}, 0.2, {"b"}),
        ({"a": 8, "b": 3, "c": 4}, 0.2, {"c"}),
        ({"a": 5, "b": 5}, 0.99, {"b"}),
        ({"a": 10, "b": 0, "c": 10, "d": 0}, 0.2, {"c"}),  # without labels
        ({"a": 10, "b": 10}, 0.0, set()),
    ],
)
def test_videos_for_validation(counts, share, expected):
    assert writer.choose_videos(counts, share) == expected


def test_validation_by_name_and_without_labels(tmp_path, capsys):
    for video, frames in {"day": 1, "night": 3, "rain": 2}.items():
        for number in range(frames):
            picture(tmp_path / "frames" / video / f"{number}.png")
            (tmp_path / "masks" / video).mkdir(parents=True, exist_ok=True)
            Image.fromarray(truth().clip(0).astype(np.uint8)).save(tmp_path / "masks" / video / f"{number}.png")
    words = [str(tmp_path / "masks"), "--format", "ids", "--classes", ",".join(NAMES)]
    assert run_command("import", [*words, "--output", str(tmp_path / "a"), "--val", "night,day"]) == 0
    assert (tmp_path / "a/val.txt").read_text() == "day\nnight\n"
    printed = capsys.readouterr().out
    assert "val: 2 videos, 4 labelled frames (day, night)" in printed
    assert "the larger part is for validation" in printed
    assert run_command("import", [*words, "--output", str(tmp_path / "b"), "--val", "0"]) == 0
    assert "a training on it is not evaluated" in capsys.readouterr().out
    for val, message in {
        "fog": "no video 'fog' for validation; there are day, night, rain",
        "day,night,rain": "none is left",
    }.items():
        assert run_command("import", [*words, "--output", str(tmp_path / "c"), "--val", val]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    for missing in (["--format", "ids"], ["--format", "colors"]):
        assert run_command("import", [words[0], *missing, "--output", str(tmp_path / "c")]) == 1
        assert ("--classes A,B" if "ids" in missing else "--table FILE") in capsys.readouterr().err


def test_cvat_masks_in_an_archive(tmp_path, monkeypatch):
    root = tmp_path / "task"
    picture(root / "JPEGImages/frame_000000.png")
    picture(root / "JPEGImages/frame_000001.png", 1)
    (root / "SegmentationClass").mkdir()
    for number in range(2):
        Image.fromarray(color_mask(truth(number))).save(root / f"SegmentationClass/frame_{number:06d}.png")
    rows = [f"{name}:{r},{g},{b}::" for name, (r, g, b) in zip(NAMES, COLORS)]
    lines = ["# label:color_rgb:parts:actions", "background:0,0,0::", *rows]
    (root / "labelmap.txt").write_text("\n".join(lines) + "\n")
    archive = tmp_path / "task.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(root.rglob("*.*")):
            file.write(path, path.relative_to(root))
    out = tmp_path / "cvat_out"
    import_dataset(archive, "cvat-masks", out, val_videos=0.5)
    # One video is cut in time.
    check(out, {("task", "frame_000000"): truth(), ("task_end", "frame_000001"): truth(1)})

    evil = tmp_path / "evil.zip"
    with zipfile.ZipFile(evil, "w") as file:
        file.writestr("../outside.txt", "x")
    with pytest.raises(ValueError, match=r"evil.zip: name '../outside.txt' leads out of its folder"):
        import_dataset(evil, "cvat-masks", tmp_path / "y")
    assert not (tmp_path / "outside.txt").exists()
    monkeypatch.setattr(writer, "ALWAYS_ALLOWED", 1 << 20)
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("labelmap.txt", b"\0" * (3 << 20))
    with pytest.raises(ValueError, match="claims to hold"):
        import_dataset(bomb, "cvat-masks", tmp_path / "z")


def test_davis(tmp_path):
    picture(tmp_path / "d/JPEGImages/480p/bear/00000.jpg")
    (tmp_path / "d/Annotations/480p/bear").mkdir(parents=True)
    image = Image.fromarray((truth() + 1).astype(np.uint8), mode="P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * (256 - 3) * 3)
    image.save(tmp_path / "d/Annotations/480p/bear/00000.png")
    out = tmp_path / "davis_out"
    import_dataset(tmp_path / "d", "davis", out, val_videos=0)
    classes = check(out, {("bear", "00000"): truth() + 1})
    assert classes["names"] == ["background", "object 1", "object 2"]
    assert classes["colors"][1] == [128, 0, 0]
    assert not (out / "val.txt").exists()


def uncompressed(mask):
    """Runs in column order, starting with zeros."""
    flat = mask.flatten(order="F").astype(int)
    changes = np.flatnonzero(np.diff(flat)) + 1
    edges = [0, *changes.tolist(), len(flat)]
    runs = np.diff(edges).tolist()
    return {"size": list(mask.shape), "counts": runs if not flat[0] else [0, *runs]}


def coco_file(annotations):
    return {
        "images": [{"id": 7, "file_name": "cam/5.jpg", "height": H, "width": W}],
        "categories": [{"id": 10, "name": "road"}, {"id": 3, "name": "car"}],
        "annotations": [{"image_id": 7, "id": i, **a} for i, a in enumerate(annotations)],
    }


def test_coco_codes_and_polygons(tmp_path):
    picture(tmp_path / "cam/5.jpg")
    labels = truth()
    road, car = labels >= 0, labels == 1
    road[3:6] = False  # the car reaches above the road
    car_box = [4, 3, 11, 3, 11, 8, 4, 8]
    annotations = [
        {"category_id": 10, "segmentation": encoded(road)},
        {"category_id": 3, "segmentation": [car_box]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(coco_file(annotations)))
    out = tmp_path / "coco_out"
    report = import_dataset(tmp_path / "a.json", "coco", out, val_videos=0)
    check(out, {("cam", "5"): labels})
    # The part of the car below row 6 was drawn over the road.
    assert report.noticed["pixels that a later shape of another class covers"] == int((road & car).sum())

    annotations[0]["segmentation"] = uncompressed(road)
    (tmp_path / "b.json").write_text(json.dumps(coco_file(annotations)))
    import_dataset(tmp_path / "b.json", "coco", tmp_path / "coco_runs", val_videos=0)
    check(tmp_path / "coco_runs", {("cam", "5"): labels})

    annotations[1]["segmentation"] = [[-5, 3, 11, 3, 11, 8, -5, 8]]
    (tmp_path / "c.json").write_text(json.dumps(coco_file(annotations)))
    report = import_dataset(tmp_path / "c.json", "coco", tmp_path / "coco_cut", val_videos=0)
    assert report.noticed["polygons that reach outside the picture, cut there"] == 1
    cut = np.asarray(Image.open(tmp_path / "coco_cut/data/cam/mask/5.png"))
    assert (cut[3:8, :11] == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 99, "segmentation": [[0, 0, 1, 0, 1, 1]]}, "category 99, which 'categories' does not list"),
        ({"category_id": 3, "segmentation": {"size": [3, 3], "counts": [9]}}, r"size \[3, 3\], the picture \[12, 20\]"),
        ({"category_id": 3, "segmentation": {"size": [H, W], "counts": [9]}}, "its runs have 9 pixels"),
        ({"category_id": 3, "segmentation": "abc"}, "a segmentation is a list of polygons or a run-length code"),
        ({"segmentation": [[0, 0, 1, 0, 1, 1]]}, "entry 0 of 'annotations' has no 'category_id'"),
    ],
)
def test_damaged_coco(tmp_path, change, message):
    picture(tmp_path / "cam/5.jpg")
    (tmp_path / "a.json").write_text(json.dumps(coco_file([change])))
    with pytest.raises(ValueError, match=message) as error:
        import_dataset(tmp_path / "a.json", "coco", tmp_path / "out")
    assert "a.json" in str(error.value)


def test_panoptic_and_vipseg(tmp_path):
    ids = {0: 70000, 1: 300}
    segments = [{"id": 70000, "category_id": 10}, {"id": 300, "category_id": 3}]
    categories = [{"id": 10, "name": "road", "color": [1, 2, 3]}, {"id": 3, "name": "car", "color": [4, 5, 6]}]
    picture(tmp_path / "p/v/5.jpg")
    segments_png(tmp_path / "p/pan/v_5.png", truth(), ids)
    content = {
        "images": [{"id": 1, "file_name": "v/5.jpg"}],
        "annotations": [{"image_id": 1, "file_name": "v_5.png", "segments_info": segments}],
        "categories": categories,
    }
    (tmp_path / "p/pan.json").write_text(json.dumps(content))
    out = tmp_path / "pan_out"
    import_dataset(tmp_path / "p/pan.json", "panoptic", out, val_videos=0)
    assert check(out, {("v", "5"): truth()})["colors"] == [[1, 2, 3], [4, 5, 6]]

    picture(tmp_path / "q/images/v/5.jpg")
    segments_png(tmp_path / "q/panomasks/v/5.png", truth(), ids)
    content = {
        "videos": [{"video_id": "v", "images": [{"id": "5", "file_name": "5.jpg"}]}],
        "annotations": [
            {"video_id": "v", "annotations": [{"image_id": "5", "file_name": "5.png", "segments_info": segments}]}
        ],
        "categories": categories,
    }
    (tmp_path / "q/vip.json").write_text(json.dumps(content))
    folders = {"frames": tmp_path / "q/images", "masks": tmp_path / "q/panomasks"}
    import_dataset(tmp_path / "q/vip.json", "vipseg", tmp_path / "vip_out", val_videos=0, options=folders)
    check(tmp_path / "vip_out", {("v", "5"): truth()})

    segments_png(tmp_path / "p/pan/v_5.png", truth(), {0: 70000, 1: 301})
    with pytest.raises(ValueError, match=r"v_5.png: segments \[301\] are not in the segments_info of .*pan.json"):
        import_dataset(tmp_path / "p/pan.json", "panoptic", tmp_path / "w")


def test_ytvis(tmp_path):
    for number in (0, 5):
        picture(tmp_path / f"JPEGImages/clip/{number:05d}.jpg", number)
    road = [encoded(truth() == 0), encoded(truth(2) == 0)]
    car = [encoded(truth() == 1), None]
    content = {
        "videos": [{"id": 1, "height": H, "width": W, "file_names": ["clip/00000.jpg", "clip/00005.jpg"]}],
        "annotations": [
            {"video_id": 1, "category_id": 10, "segmentations": road},
            {"video_id": 1, "category_id": 3, "segmentations": car},
        ],
        "categories": [{"id": 10, "name": "road"}, {"id": 3, "name": "car"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    out = tmp_path / "yt_out"
    import_dataset(tmp_path / "instances.json", "ytvis", out, val_videos=0)
    second = truth(2)
    second[second == 1] = -1
    check(out, {("clip", "00000"): truth(), ("clip", "00005"): second})
    content["annotations"][1]["segmentations"] = car[:1]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="an object of video 1 has 1 masks for 2 frames"):
        import_dataset(tmp_path / "instances.json", "ytvis", tmp_path / "w")


def labelme_file(path, shapes):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"shapes": shapes, "imagePath": f"..\\x\\{path.stem}.jpg", "imageHeight": H, "imageWidth": W}
    path.write_text(json.dumps(content))


def test_labelme(tmp_path):
    picture(tmp_path / "lm/v/1.jpg")
    shapes = [
        {"label": "road", "points": [[0, 6], [W, 6], [W, H], [0, H]], "shape_type": "polygon"},
        {"label": "car", "points": [[4, 3], [11, 8]], "shape_type": "rectangle"},
    ]
    labelme_file(tmp_path / "lm/v/1.json", shapes)
    out = tmp_path / "lm_out"
    import_dataset(tmp_path / "lm", "labelme", out, val_videos=0, options={"names": NAMES})
    check(out, {("v", "1"): truth()})
    with pytest.raises(ValueError, match=r"1.json: unknown class 'car'; known: road"):
        import_dataset(tmp_path / "lm", "labelme", tmp_path / "w", options={"names": ["road"]})
    labelme_file(tmp_path / "lm/v/1.json", [{"label": "car", "points": [[1, 1]], "shape_type": "point"}])
    with pytest.raises(ValueError, match=r"1.json: shape 'point' of 1 points"):
        import_dataset(tmp_path / "lm", "labelme", tmp_path / "w")


def brush(mask, runs=True):
    """Label Studio's code of a mask, as its stream is described: runs of equal values, or all values one by one."""
    values = np.repeat((mask.astype(np.uint8) * 255).reshape(-1), 4)
    widths = [3, 4, 8, 16]
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{w - 1:04b}" for w in widths)
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    for start, end in pairwise(edges):
        if runs:
            bits += "1" + f"{3:02b}" + f"{end - start - 1:016b}" + f"{values[start]:08b}"
        else:
            bits += "0" + f"{3:02b}" + f"{end - start - 1:016b}" + "".join(f"{v:08b}" for v in values[start:end])
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


@pytest.mark.parametrize("runs", [True, False])
def test_label_studio(tmp_path, runs):
    picture(tmp_path / "f.jpg")
    picture(tmp_path / "g.jpg", 1)
    size = {"original_width": W, "original_height": H}
    car = [[100 * x / W, 100 * y / H] for x, y in ((4, 3), (11, 3), (11, 8), (4, 8))]
    result = [
        {"type": "brushlabels", **size, "value": {"rle": brush(truth() == 0, runs), "brushlabels": ["road"]}},
        {"type": "polygonlabels", **size, "value": {"points": car, "polygonlabels": ["car"]}},
        {"type": "choices", "value": {"choices": ["day"]}},
    ]
    old = {"result": [], "updated_at": "2024-01-01", "was_cancelled": False}
    new = {"result": result, "updated_at": "2024-02-01", "was_cancelled": False}
    tasks = [
        {"id": 1, "data": {"image": "/data/upload/3/ab12cd34-f.jpg"}, "annotations": [new, old]},
        {"id": 2, "data": {"image": "/data/local-files/?d=some/g.jpg"}, "annotations": []},
    ]
    (tmp_path / "ls.json").write_text(json.dumps(tasks))
    out = tmp_path / "ls_out"
    report = import_dataset(tmp_path / "ls.json", "label-studio", out, val_videos=0, options={"names": NAMES})
    check(out, {("ls", "f"): truth()})
    assert (report.frames, report.labelled) == (2, 1)
    result[0]["value"]["rle"] = result[0]["value"]["rle"][:20]
    (tmp_path / "ls.json").write_text(json.dumps(tasks))
    with pytest.raises(ValueError, match="task 1: a brush mask cannot be read: the run-length code"):
        import_dataset(tmp_path / "ls.json", "label-studio", tmp_path / "w")


def test_brush_code_against_label_studio():
    brushes = pytest.importorskip("label_studio_sdk.converter.brush")
    mask = np.random.default_rng(0).random((H, W)) > 0.5
    code = brushes.encode_rle(np.repeat((mask.astype(np.uint8) * 255).reshape(-1), 4))
    assert np.array_equal(decode_brush(code, 4 * H * W).reshape(H, W, 4)[..., 3] > 0, mask)


def test_cvat_video(tmp_path):
    for number in range(3):
        picture(tmp_path / f"images/frame_{number:06d}.png", number)
    road = f"0,6;{W},6;{W},{H};0,{H}"
    runs = "0,35"  # a full box of 7 x 5
    (tmp_path / "annotations.xml").write_text(f"""<?xml version="1.0"?>
<annotations><meta><task><name>my task</name><labels>
<label><name>road</name><color>#804080</color></label><label><name>car</name><color>#00008e</color></label>
</labels></task></meta>
<track id="0" label="road"><polygon frame="0" outside="0" keyframe="1" points="{road}" z_order="0"/>
<polygon frame="2" outside="1" keyframe="1" points="{road}" z_order="0"/></track>
<track id="1" label="car">
<mask frame="0" outside="0" rle="{runs}" left="4" top="3" width="7" height="5" z_order="1"/></track>
</annotations>""")
    out = tmp_path / "cv_out"
    import_dataset(tmp_path / "annotations.xml", "cvat-video", out, val_videos=0)
    plain = np.where(truth() == 0, 0, -1).astype(np.int32)
    plain[6:] = 0
    nothing = np.full((H, W), -1, np.int32)
    classes = check(out, {("my_task", "000000"): truth(), ("my_task", "000001"): plain, ("my_task", "000002"): nothing})
    assert classes["colors"] == [list(color) for color in COLORS]
    (tmp_path / "annotations.xml").write_text('<!DOCTYPE a [<!ENTITY b "c">]><annotations/>')
    with pytest.raises(ValueError, match="declares XML entities"):
        import_dataset(tmp_path / "annotations.xml", "cvat-video", tmp_path / "w")


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="format 'voc': expected one of ids"):
        import_dataset(tmp_path, "voc", tmp_path / "x")
    with pytest.raises(ValueError, match="format coco takes no table"):
        import_dataset(tmp_path, "coco", tmp_path / "x", options={"table": tmp_path})
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(FileExistsError, match="full is there already and not empty"):
        import_dataset(tmp_path, "coco", tmp_path / "full")
    picture(tmp_path / "cam/5.jpg", size=(W + 1, H))
    (tmp_path / "a.json").write_text(json.dumps(coco_file([])))
    with pytest.raises(ValueError, match=r"5.jpg"):
        import_dataset(tmp_path / "a.json", "coco", tmp_path / "x")


def test_command(tmp_path, capsys):
    assert set(import_.FORMATS) == set(FORMATS)
    picture(tmp_path / "cam/5.jpg")
    (tmp_path / "a.json").write_text(json.dumps(coco_file([{"category_id": 3, "segmentation": encoded(truth() == 1)}])))
    assert run_command("import", [str(tmp_path / "a.json"), "--format", "coco", "--output", str(tmp_path / "o")]) == 0
    text = capsys.readouterr().out
    assert "1 videos, 1 frames, 1 of them labelled" in text
    assert "2 classes: road, car" in text
    assert run_command("import", [str(tmp_path / "a.json"), "--format", "coco", "--output", str(tmp_path / "o")]) == 1
