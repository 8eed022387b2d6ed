"""Exporters: what they write is what the format's own library reads, and what our importers read, pixel for pixel."""

import json
import zipfile
from itertools import count
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from exporter_fixtures import CLASSES, IGNORE, NAMES, H, W, export, label_map, videos, write_pictures
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from the_mask.data.classes import make_class_list
from the_mask.data.exporters import FORMATS, LabelFrame, class_masks, to_supervision
from the_mask.data.exporters.label_studio import encode_brush
from the_mask.data.importers import import_dataset
from the_mask.data.importers.shapes import decode_brush


@pytest.fixture
def pictures(tmp_path):
    """Folder of pictures of :func:`videos`."""
    return write_pictures(tmp_path / "pictures")


def imported(output):
    """Masks of an imported tree by (video, frame), and its classes."""
    classes = json.loads((output / "classes.json").read_text())
    found = {
        (path.parent.parent.relative_to(output / "data").as_posix(), path.stem): np.asarray(Image.open(path))
        for path in output.glob("data/**/mask/*.png")
    }
    return found, classes


def same(found, given, names=str):
    expected = {(video, names(f"{t:05d}")): m for video, maps in given.items() for t, m in enumerate(maps)}
    assert found.keys() == expected.keys()
    for key, labels in expected.items():
        assert np.array_equal(found[key], labels), key


def test_coco_against_pycocotools(tmp_path, pictures, capsys):
    report = export("coco", tmp_path / "out", model="street-live")
    assert [path.relative_to(tmp_path / "out").as_posix() for path in report.files] == ["cam1/a.json", "b.json"]
    for video, maps in videos().items():
        coco = COCO(str(tmp_path / "out" / f"{video}.json"))
        assert [coco.cats[i]["name"] for i in (1, 2, 3)] == NAMES
        assert len(coco.imgs) == len(maps)
        for number, labels in enumerate(maps):
            assert coco.imgs[number + 1]["file_name"] == f"{video}/{number:05d}.png"
            read = np.full(labels.shape, IGNORE)
            for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[number + 1])):
                mask = coco.annToMask(annotation) > 0
                ys, xs = np.nonzero(mask)
                assert annotation["area"] == mask.sum()
                assert annotation["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
                read[mask] = annotation["category_id"] - 1
            assert np.array_equal(read, labels)
        out = tmp_path / f"back_{video.replace('/', '_')}"
        import_dataset(tmp_path / "out" / f"{video}.json", "coco", out, val_videos=0, options={"frames": pictures})
        found, classes = imported(out)
        same(found, {video: maps})
        assert classes["names"] == NAMES
        assert [tuple(color) for color in classes["colors"]] == list(CLASSES.colors)


def test_panoptic(tmp_path, pictures):
    export("panoptic", tmp_path / "out")
    for video, maps in videos().items():
        source = tmp_path / "out" / f"{video}.json"
        content = json.loads(source.read_text())
        for annotation, labels in zip(content["annotations"], maps, strict=True):
            pixels = np.asarray(Image.open(source.with_suffix("") / annotation["file_name"])).astype(int)
            ids = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
            # As panopticapi checks a file: every id is a segment's, every segment is there, areas agree.
            assert {s["id"]: s["area"] for s in annotation["segments_info"]} == {
                int(i): int((ids == i).sum()) for i in np.unique(ids) if i
            }
            assert np.array_equal(np.where(ids == 0, IGNORE, ids - 1), labels)
        out = tmp_path / f"back_{video.replace('/', '_')}"
        import_dataset(source, "panoptic", out, val_videos=0, options={"frames": pictures})
        same(imported(out)[0], {video: maps})


def test_ytvis(tmp_path, pictures):
    export("ytvis", tmp_path / "out")
    content = json.loads((tmp_path / "out/annotations.json").read_text())
    assert [video["length"] for video in content["videos"]] == [3, 2]
    by_frame = [item["segmentations"][1] for item in content["annotations"] if item["video_id"] == 1]
    assert by_frame == [None, None, None]
    for item in content["annotations"]:
        for code, box, area in zip(item["segmentations"], item["bboxes"], item["areas"], strict=True):
            assert (code is None) == (box is None) == (area is None)
            assert code is None or coco_mask.area(code) == area
    out = tmp_path / "back"
    import_dataset(
        tmp_path / "out/annotations.json", "ytvis", out, val_videos=0, options={"frames": pictures}
    )  # fmt: skip
    same(imported(out)[0], videos())


def test_cvat_masks(tmp_path, pictures):
    export("cvat-masks", tmp_path / "out")
    for video, maps in videos().items():
        archive = tmp_path / "out" / f"{video}.zip"
        out = tmp_path / f"back_{video.replace('/', '_')}"
        import_dataset(archive, "cvat-masks", out, val_videos=0, options={"frames": pictures / video})
        found, classes = imported(out)
        same(found, {Path(video).name: maps})
        assert classes["names"] == NAMES
        assert [tuple(color) for color in classes["colors"]] == list(CLASSES.colors)
    first = (tmp_path / "out/b.zip").read_bytes()
    export("cvat-masks", tmp_path / "again")
    assert (tmp_path / "again/b.zip").read_bytes() == first


def test_cvat_masks_with_colours_that_clash(tmp_path):
    classes = make_class_list(
        ["road", "background", "car", "night"], colors=[(9, 9, 9), (1, 2, 3), (9, 9, 9), (0, 0, 0)]
    )
    labels = np.arange(4, dtype=np.uint8).repeat(5).reshape(4, 5)
    report = export("cvat-masks", tmp_path / "out", {"v": [labels]}, classes)
    assert report.noticed["classes with another colour, theirs is black or that of another class"] == 2
    with zipfile.ZipFile(tmp_path / "out/v.zip") as archive:
        rows = archive.read("labelmap.txt").decode().splitlines()
        pixels = np.asarray(Image.open(archive.open("SegmentationClass/00000.png")))
        assert archive.read("ImageSets/Segmentation/default.txt") == b"00000\n"
    table = {tuple(map(int, row.split(":")[1].split(","))): row.split(":")[0] for row in rows[1:]}
    assert len(table) == 4
    assert [table[tuple(pixels[i, 0].tolist())] for i in range(4)] == ["road", "background", "car", "night"]
    bad = make_class_list(["a:b"])
    with pytest.raises(ValueError, match=r"class 'a:b': CVAT's labelmap.txt holds no names"):
        export("cvat-masks", tmp_path / "bad", {"v": [labels * 0]}, bad)


def test_cvat_masks_against_datumaro(tmp_path):
    """CVAT reads such archives by datumaro's reader of Pascal VOC."""
    datumaro = pytest.importorskip("datumaro")
    export("cvat-masks", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out/b.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    dataset = datumaro.Dataset.import_from(str(tmp_path / "unpacked"), "voc_segmentation")
    names = [category.name for category in dataset.categories()[datumaro.AnnotationType.label].items]
    assert names == ["background", *NAMES]
    found = {item.id: item for item in dataset}
    assert len(found) == 2
    for number, labels in enumerate(videos()["b"]):
        read = np.full(labels.shape, IGNORE)
        for annotation in found[f"{number:05d}"].annotations:
            if names[annotation.label] != "background":
                read[annotation.image > 0] = names.index(annotation.label and names[annotation.label]) - 1
        assert np.array_equal(read, labels)


def test_cvat_video(tmp_path, pictures):
    export("cvat-video", tmp_path / "out")
    for video, maps in videos().items():
        out = tmp_path / f"back_{video.replace('/', '_')}"
        source = tmp_path / "out" / f"{video}.xml"
        import_dataset(source, "cvat-video", out, val_videos=0, options={"frames": pictures / video})
        found, classes = imported(out)
        same(found, {video.replace("/", "_"): maps}, lambda name: f"{int(name):06d}")
        assert classes["names"] == NAMES


def test_codes_of_cvat_against_datumaro(tmp_path):
    """Datumaro reads masks of pictures only, not of tracks: the same elements, put into pictures."""
    datumaro = pytest.importorskip("datumaro")
    export("cvat-video", tmp_path / "out")
    root = ElementTree.parse(tmp_path / "out/b.xml").getroot()
    images = {}
    for number in range(2):
        attributes = {"id": str(number), "name": f"{number:05d}.png", "width": str(W), "height": str(H)}
        images[number] = ElementTree.SubElement(root, "image", attributes)
    for track in root.findall("track"):
        first, last = track
        assert (first.get("outside"), last.get("outside")) == ("0", "1")
        assert int(last.get("frame")) == int(first.get("frame")) + 1
        first.set("label", track.get("label"))
        images[int(first.get("frame"))].append(first)
        root.remove(track)
    root.find("./meta/task/mode").text = "annotation"
    (tmp_path / "task/images").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (W, H)).save(tmp_path / f"task/images/{number:05d}.png")
    ElementTree.ElementTree(root).write(tmp_path / "task/annotations.xml")
    dataset = datumaro.Dataset.import_from(str(tmp_path / "task"), "cvat")
    names = [category.name for category in dataset.categories()[datumaro.AnnotationType.label].items]
    assert names == NAMES
    found = {int(item.attributes["frame"]): item for item in dataset}
    for number, labels in enumerate(videos()["b"]):
        read = np.full(labels.shape, IGNORE)
        for annotation in found[number].annotations:
            read[annotation.image > 0] = annotation.label
        assert np.array_equal(read, labels)


def accepted(path):
    """Label Studio makes an annotation of a prediction that a person accepts: the same regions."""
    tasks = json.loads(path.read_text())
    return [{**task, "annotations": [{"result": task["predictions"][0]["result"]}]} for task in tasks]


def test_label_studio(tmp_path, pictures):
    given = {"b": videos()["b"]}
    export("label-studio", tmp_path / "out", given, model="street-live", url="/data/local-files/?d=pictures/")
    tasks = accepted(tmp_path / "out/tasks.json")
    assert tasks[0]["data"] == {
        "image": "/data/local-files/?d=pictures/b/00000.png", "video": "b", "frame": "00000"
    }  # fmt: skip
    assert tasks[0]["predictions"][0]["model_version"] == "street-live"
    (tmp_path / "b.json").write_text(json.dumps(tasks))
    out = tmp_path / "back"
    options = {"frames": pictures / "b", "names": NAMES}
    import_dataset(tmp_path / "b.json", "label-studio", out, val_videos=0, options=options)
    same(imported(out)[0], given)
    assert '<Label value="tree &amp; co" background="#6b8e23"/>' in (tmp_path / "out/config.xml").read_text()


def test_label_studio_with_several_videos(tmp_path, pictures):
    """A project's export is one file, in the order of its tasks; frames of two videos have one name."""
    export("label-studio", tmp_path / "out")
    tasks = accepted(tmp_path / "out/tasks.json")
    (tmp_path / "export.json").write_text(json.dumps(tasks[::2] + tasks[1::2]))
    out = tmp_path / "back"
    options = {"frames": pictures, "names": NAMES}
    import_dataset(tmp_path / "export.json", "label-studio", out, val_videos=0, options=options)
    given = videos()
    found = imported(out)[0]
    assert ("cam1/a", "00001") not in found, "nothing was drawn into it"
    found["cam1/a", "00001"] = given["cam1/a"][1]
    same(found, given)


@pytest.mark.parametrize("size", [(1, 1), (H, W), (70, 640)])
def test_brush_code(size):
    rng = np.random.default_rng(size[0])
    for mask in (rng.random(size) > 0.5, np.zeros(size, bool), np.ones(size, bool), rng.random(size) > 0.999):
        code = encode_brush(mask)
        values = decode_brush(code, 4 * mask.size).reshape(*size, 4)
        assert np.array_equal(values, np.repeat(mask[..., None] * np.uint8(255), 4, axis=-1))


def test_brush_code_against_label_studio():
    brushes = pytest.importorskip("label_studio_sdk.converter.brush")
    rng = np.random.default_rng(0)
    for mask in (rng.random((H, W)) > 0.5, rng.random((40, 600)) > 0.9995, np.ones((3, 7), bool)):
        read = brushes.decode_rle(encode_brush(mask)).reshape(*mask.shape, 4)
        assert np.array_equal(read, np.repeat(mask[..., None] * np.uint8(255), 4, axis=-1))


def test_label_studio_tasks_against_its_own_reader(tmp_path):
    """The interface and the predictions fit each other, as Label Studio checks them."""
    interface = pytest.importorskip("label_studio_sdk.label_interface").LabelInterface
    export("label-studio", tmp_path / "out")
    config = interface((tmp_path / "out/config.xml").read_text())
    config.validate()
    for task in json.loads((tmp_path / "out/tasks.json").read_text()):
        for prediction in task["predictions"]:
            errors = config.validate_prediction(prediction, return_errors=True)
            assert not errors, errors


def test_fiftyone(tmp_path):
    export("fiftyone", tmp_path / "out")
    assert json.loads((tmp_path / "out/mask_targets.json").read_text()) == {"1": NAMES[0], "2": NAMES[1], "3": NAMES[2]}
    for video, maps in videos().items():
        for number, labels in enumerate(maps):
            values = np.asarray(Image.open(tmp_path / "out/labels" / video / f"{number:05d}.png")).astype(int)
            assert np.array_equal(np.where(values == 0, IGNORE, values - 1), labels)


@pytest.mark.parametrize("form", ["coco", "panoptic", "ytvis", "cvat-masks", "cvat-video", "fiftyone"])
def test_more_than_255_classes(tmp_path, form):
    classes = make_class_list([f"class {i}" for i in range(300)], void_values=[65535])
    labels = label_map(3, classes=300)
    labels[0, :3] = 255, 256, 299
    export(form, tmp_path / "out", {"v": [labels]}, classes)
    (tmp_path / "v").mkdir()
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(tmp_path / "v/00000.png")
    if form == "fiftyone":
        values = np.asarray(Image.open(tmp_path / "out/labels/v/00000.png")).astype(int)
        assert np.array_equal(np.where(values == 0, 65535, values - 1), labels)
        return
    source = {"ytvis": "annotations.json", "cvat-masks": "v.zip", "cvat-video": "v.xml"}.get(form, "v.json")
    frames = tmp_path / "v" if form.startswith("cvat") else tmp_path
    import_dataset(tmp_path / "out" / source, form, tmp_path / "back", val_videos=0, options={"frames": frames})
    ((_, found),) = imported(tmp_path / "back")[0].items()
    assert np.array_equal(found, labels)


def test_masks_in_memory():
    labels = label_map(5)
    found = class_masks(labels, 3)
    assert found.class_ids.tolist() == [0, 1, 2]
    for label, mask, (x0, y0, x1, y1), area in zip(found.class_ids, found.masks, found.boxes, found.areas):
        ys, xs = np.nonzero(labels == label)
        assert (x0, y0, x1, y1) == (xs.min(), ys.min(), xs.max(), ys.max())
        assert area == len(xs)
        assert np.array_equal(mask, labels == label)
    nothing = class_masks(np.full((H, W), 255), 3)
    assert nothing.masks.shape == (0, H, W)
    assert nothing.boxes.shape == (0, 4)
    with pytest.raises(ValueError, match=r"label map: expected integers \[height, width\], got float64"):
        class_masks(np.zeros((H, W)), 3)


def test_supervision(monkeypatch):
    torch = pytest.importorskip("torch")
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "supervision", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'the_mask\[supervision\]'"):
            to_supervision(label_map(5), NAMES)
    supervision = pytest.importorskip("supervision")
    labels = label_map(5)
    found = to_supervision(torch.from_numpy(labels.astype(np.int64)), NAMES)
    assert list(found["class_name"]) == NAMES
    assert np.array_equal(found.xyxy, supervision.mask_to_xyxy(found.mask))
    assert np.array_equal(found.area, [(labels == i).sum() for i in range(3)])
    picture = np.zeros((H, W, 3), np.uint8)
    assert supervision.MaskAnnotator().annotate(picture.copy(), found).any()
    assert len(to_supervision(np.full((H, W), 255), NAMES)) == 0


@pytest.mark.parametrize("form", FORMATS)
def test_bad_frames(tmp_path, form):
    good = LabelFrame("v", "0", label_map(0), "v/0.png")
    numbers = count()

    def exporter():
        return FORMATS[form](tmp_path / f"out{next(numbers)}", CLASSES)

    with pytest.raises(ValueError, match=r"video v, frame 0: values \[3, 9\] are no train ids; expected 0..2, or 255"):
        exporter().write(LabelFrame("v", "0", np.array([[0, 3, 9]], np.uint8), "v/0.png"))
    with pytest.raises(ValueError, match="leads out of its folder"):
        exporter().write(LabelFrame("../v", "0", label_map(0), "v/0.png"))
    with pytest.raises(ValueError, match="expected integers"):
        exporter().write(LabelFrame("v", "0", np.zeros((3, 3)), "v/0.png"))
    again = exporter()
    again.write(good)
    with pytest.raises(ValueError, match="video v has two frames named 0"):
        again.write(good)
    parts = exporter()
    for video in ("v", "w"):
        parts.write(LabelFrame(video, "0", label_map(0), f"{video}/0.png"))
    with pytest.raises(ValueError, match="the frames of video v do not come together"):
        parts.write(LabelFrame("v", "1", label_map(0), "v/1.png"))
    other = LabelFrame("v", "1", label_map(0, size=(H + 1, W)), "v/1.png")
    sizes = exporter()
    sizes.write(good)
    if form in ("ytvis", "cvat-video"):
        with pytest.raises(ValueError, match=r"video v, frame 1 is 14x21 .* before it 13x21"):
            sizes.write(other)
    else:
        sizes.write(other)
        sizes.close()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(FileExistsError, match="full is there already and not empty"):
        FORMATS[form](tmp_path / "full", CLASSES)
    nothing = FORMATS[form](tmp_path / "nothing", CLASSES)
    nothing.close()
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("form", FORMATS)
def test_names_that_files_cannot_hold(tmp_path, form):
    """A control character makes XML that no tool reads, and one that is no character cannot be encoded."""
    for name in ("a\0", "a\x0b", "a\n", "a\ufffe", "a\udcff"):
        with pytest.raises(ValueError, match=r"class .* cannot hold"):
            FORMATS[form](tmp_path / "out", make_class_list([name, "b", "c"]))
        for frame in ((name, "0", "v/0.png"), ("v", name, "v/0.png"), ("v", "0", f"v/{name}.png")):
            with pytest.raises(ValueError, match=r"cannot hold|names no file"):
                FORMATS[form](tmp_path / "out", CLASSES).write(LabelFrame(frame[0], frame[1], label_map(0), frame[2]))
    with pytest.raises(ValueError, match="leads out"):
        FORMATS[form](tmp_path / "out", CLASSES).write(LabelFrame("v", "../0", label_map(0), "v/0.png"))
    assert list(tmp_path.iterdir()) == []


def test_one_picture_of_two_frames(tmp_path):
    """FiftyOne's masks have the names of the pictures: the second one would replace the first."""
    exporter = FORMATS["fiftyone"](tmp_path / "out", CLASSES)
    exporter.write(LabelFrame("v", "0", label_map(0), "p.png"))
    with pytest.raises(ValueError, match=r"picture p\.png is that of another frame"):
        exporter.write(LabelFrame("w", "0", label_map(0), "p.png"))
    assert list(tmp_path.iterdir()) == []


def test_after_an_error_nothing_is_written(tmp_path):
    """Neither what was complete before nor what comes after; without a ``with`` block too."""
    exporter = FORMATS["ytvis"](tmp_path / "out", CLASSES)
    exporter.write(LabelFrame("v", "0", label_map(0), "v/0.png"))
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["out.partial"]
    with pytest.raises(ValueError, match="one size per video"):
        exporter.write(LabelFrame("v", "1", label_map(0, size=(H + 1, W)), "v/1.png"))
    with pytest.raises(ValueError, match="needs a new exporter"):
        exporter.write(LabelFrame("w", "0", label_map(0), "w/0.png"))
    exporter.close()
    assert list(tmp_path.iterdir()) == []
