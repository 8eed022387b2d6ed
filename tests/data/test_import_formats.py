"""The same labels in every format: right ones come out pixel for pixel, and every bad input has a name."""

import base64
import copy
import io
import json
import zipfile

import numpy as np
import pytest
from format_fixtures import CAR, MASKS, ROAD, SHAPES, VIDEO, load, made, pairs, values_png
from importer_fixtures import COLORS, NAMES, H, W, check, encoded, picture, truth
from PIL import Image

from the_mask.data.importers import FORMATS, import_dataset


def only_mask(output):
    (path,) = output.glob("data/**/mask/*.png")
    return np.asarray(Image.open(path)).astype(np.int32)


def test_every_format_is_here():
    assert {*SHAPES, *MASKS, "video"} == set(FORMATS)


@pytest.mark.parametrize("form", [*SHAPES, *MASKS])
def test_pixel_for_pixel(tmp_path, form):
    folder = tmp_path / "x"
    report = load(form, folder)
    # Value 0 of DAVIS is a class of its own.
    classes = check(folder / "out", {VIDEO.get(form, ("v", "5")): truth() + (form == "davis")})
    assert sorted(classes["names"]) == sorted(["background", *NAMES] if form == "davis" else NAMES)
    assert (report.frames, report.labelled, report.videos) == (1, 1, 1)


@pytest.mark.parametrize("form", SHAPES)
def test_later_shapes_cover_earlier_ones(tmp_path, form):
    report = load(form, tmp_path, shapes=[("car", CAR), ("road", ROAD)])
    expected = truth()
    expected[6:, 4:11] = 0
    covered = (truth()[6:] == 1).sum()
    assert np.array_equal(only_mask(tmp_path / "out"), np.where(expected < 0, 255, expected))
    assert report.noticed["pixels that a later shape of another class covers"] == covered


def inside_polygon(polygon):
    """Pixels whose centres are in a polygon, and those so near to its border that rasterisers may differ."""
    ys, xs = np.mgrid[:H, :W] + 0.5
    corners = np.array(pairs(polygon), float)
    odd, near = np.zeros((H, W), bool), np.zeros((H, W), bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0)):
        crosses = (y0 > ys) != (y1 > ys)
        odd ^= crosses & (xs < x0 + (ys - y0) / np.where(y1 == y0, 1, y1 - y0) * (x1 - x0))
        t = ((xs - x0) * (x1 - x0) + (ys - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2)
        t = t.clip(0, 1)
        near |= np.hypot(xs - x0 - t * (x1 - x0), ys - y0 - t * (y1 - y0)) < 1.1
    return odd, near


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize(
    "polygon",
    [
        [-9, 2, 12, -6, 14, 20],  # corners beyond three sides: bending them to the border changes the slopes
        [10, -40, 45, 6, 10, 50, -25, 6],  # the picture lies within
        [-300, 5, 10, 2, 600, 5, 10, 9],  # far beyond
        [3, 3, 30, 3, 30, 5, 8, 5, 8, 9, 30, 9, 30, 11, 3, 11],  # two arms reach out
    ],
)
def test_polygons_that_reach_outside(tmp_path, form, polygon):
    report = load(form, tmp_path, shapes=[("car", polygon), ("road", [-9, 1, -3, 1, -3, 9])])
    assert report.noticed["polygons that reach outside the picture, cut there"] == 1
    assert report.noticed["polygons outside the picture, left out"] == 1
    expected, near = inside_polygon(polygon)
    found = only_mask(tmp_path / "out") == 1
    assert np.array_equal(found[~near], expected[~near])
    assert found.any()


UNKNOWN = {
    "coco": "coco.json: an annotation has category 99, which 'categories' does not list",
    "ytvis": "ytvis.json: an annotation has category 99, which 'categories' does not list",
    "labelme": "5.json: unknown class 'tree'; known: road, car",
    "label-studio": "v.json, task 1: unknown class 'tree'; known: road, car",
    "cvat-images": "images.xml, picture v/5.png: unknown class 'tree'; known: road, car",
    "cvat-video": "video.xml, track 0: unknown class 'tree'; known: road, car",
    "ids": r"5.png: values \[2\] are no class",
    "colors": r"5.png: colour \(9, 9, 9\) \(240 pixels\) is not in the table of classes",
    "cvat-masks": r"5.png: colour \(9, 9, 9\) \(240 pixels\) is not in the table of classes",
    "davis": "5.png: value 3, but there are 3 classes: background, road, car",
    "mapillary": r"5.png: values \[3\] are no class",
    "ade": r"5_seg.png: classes \[3000\] have no name",
    "panoptic": r"a.png: segments \[5\] are not in the segments_info of .*pan.json",
    "cityscapes-vps": r"final_mask.png: segments \[5\] are not in the segments_info of .*vps.json",
    "vipseg": r"a.png: segments \[5\] are not in the segments_info of .*vip.json",
}


@pytest.mark.parametrize("form", [*SHAPES, *MASKS])
def test_an_unknown_class(tmp_path, form):
    labels = np.full((H, W), 7 if form == "mapillary" else 2, np.int32)
    with pytest.raises(ValueError, match=UNKNOWN[form]):
        load(form, tmp_path, shapes=[("tree", CAR)], labels=labels)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", [*SHAPES, *MASKS])
def test_a_class_twice(tmp_path, form):
    if form == "ade":
        # Classes come from every picture's own file: one number must not have two names.
        source, _ = made(form, tmp_path)
        for suffix in (".jpg", "_seg.png"):
            (source / f"6{suffix}").write_bytes((source / f"5{suffix}").read_bytes())
        (source / "6.json").write_text((source / "5.json").read_text("latin-1").replace("car", "cat"), "latin-1")
        with pytest.raises(ValueError, match=r"6_seg.png: class 401 is 'cat' here and 'car' elsewhere"):
            import_dataset(source, form, tmp_path / "out")
        return
    labels = np.zeros((H, W), np.int32)
    with pytest.raises(ValueError, match="classes named twice: road"):
        load(form, tmp_path, names=["road", "road"], shapes=[("road", CAR)], labels=labels)


@pytest.mark.parametrize("form", [*SHAPES, *MASKS])
def test_a_picture_of_another_size(tmp_path, form):
    with pytest.raises(ValueError, match=r"5.*(png|jpg).*12x20|5.*(png|jpg).*13x21|12x20.*5.*(png|jpg)"):
        load(form, tmp_path, size=(W + 1, H + 1))


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "video"])
def test_archives(tmp_path, form):
    """Names that lead out are refused before anything is written; a good archive is read like its content."""
    source, options = made(form, tmp_path)
    top = source if source.is_dir() else source.parent
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as file:
        for path in sorted(top.rglob("*")) if source.is_dir() else [source]:
            file.write(path, path.relative_to(top))
    if form == "mapillary":
        options["table"] = tmp_path / "config_v2.0.json"
    if form == "panoptic":
        options["masks"] = tmp_path / "pan"
    import_dataset(tmp_path / "v.zip", form, tmp_path / "good", val_videos=0, options=options)
    expected = np.where(truth() < 0, 255, truth()) if form != "davis" else truth() + 1
    assert np.array_equal(only_mask(tmp_path / "good"), expected)
    with zipfile.ZipFile(tmp_path / "v.zip", "a") as file:
        file.writestr("../outside.txt", "x")
    with pytest.raises(ValueError, match=r"v.zip: name '../outside.txt' leads out of its folder"):
        import_dataset(tmp_path / "v.zip", form, tmp_path / "bad", options=options)
    assert not list(tmp_path.rglob("outside.txt"))
    assert not (tmp_path / "bad").exists()
    (tmp_path / "w.zip").write_bytes((tmp_path / "v.zip").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"w.zip(:| is) not a zip archive"):
        import_dataset(tmp_path / "w.zip", form, tmp_path / "bad", options=options)


def changed(content, junk):
    """Copies of a JSON document, each with one node that is something else or absent."""

    def places(node, path):
        yield path
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            yield from places(value, (*path, key))

    for path in places(content, ()):
        for other_value in junk:
            if not path:
                yield other_value
                continue
            other = copy.deepcopy(content)
            node = other
            for key in path[:-1]:
                node = node[key]
            if other_value == "gone":
                del node[path[-1]]
            else:
                node[path[-1]] = other_value
            yield other


def failure(source, form, output, options):
    """What an import says when it fails; any other error than these two is a defect."""
    try:
        import_dataset(source, form, output, val_videos=0, options=options)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return ""


JSON = ["coco", "ytvis", "labelme", "label-studio", "panoptic", "cityscapes-vps", "vipseg", "ade", "ids", "mapillary"]


@pytest.mark.parametrize("form", JSON)
@pytest.mark.parametrize(
    "junk",
    [
        pytest.param(("gone", [["x"]]), id="some"),
        pytest.param((None, -1, 1e30, "x", [], {"a": 1}, [[1]], True), id="all", marks=pytest.mark.slow),
    ],
)
def test_every_damage_of_a_json_file_has_a_name(tmp_path, form, junk, monkeypatch):
    """One node after the other is replaced: the import is an error that names a file, or it works."""
    source, options = made(form, tmp_path)
    path = {"labelme": source / "v/5.json", "ade": source / "5.json", "ids": source / "classes.json"}.get(form, source)
    path = tmp_path / "config_v2.0.json" if form == "mapillary" else path
    content = json.loads(path.read_text("latin-1"))
    if form == "coco":
        content["annotations"] = content["annotations"][:1]
        content["annotations"][0]["segmentation"] = encoded(truth() == 1)
    monkeypatch.setattr("os.sync", lambda: None)
    names = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    refused = 0
    for number, other in enumerate(changed(content, junk)):
        path.write_text(json.dumps(other))
        error = failure(source, form, tmp_path / f"out{number}", options)
        assert not error or any(name in error for name in names) or str(source) in error, f"{other}: {error}"
        refused += bool(error)
    assert refused > 10


XML = [
    *(
        'frame="5"',
        'outside="0"',
        'z_order="0"',
        'label="road"',
        'name="v/5.png"',
        "points=",
        "#804080",
        "<name>road</name>",
    ),
    *("<labels>", "</annotations>", "6;20", ",6", "<track", "<polygon", "0,6"),
]


@pytest.mark.parametrize("form", ["cvat-images", "cvat-video"])
def test_every_damage_of_an_xml_file_has_a_name(tmp_path, form):
    source, options = made(form, tmp_path)
    text = source.read_text()
    junk = ("", "x", "-1", "1e9", 'frame="99999999999"')
    for number, (old, new) in enumerate((old, new) for old in XML if old in text for new in junk):
        source.write_text(text.replace(old, new, 1))
        error = failure(source, form, tmp_path / f"out{number}", options)
        assert not error or source.name in error, (old, new, error)


def test_masks_of_cvat_that_do_not_fit(tmp_path):
    source, options = made("cvat-images", tmp_path)
    text = source.read_text()
    good = '<mask label="car" rle="0, 35" left="4" top="3" width="7" height="5" z_order="9"/>'
    source.write_text(text.replace("</image>", f"{good}</image>"))
    import_dataset(source, "cvat-images", tmp_path / "good", val_videos=0, options=options)
    check(tmp_path / "good", {("v", "5"): truth()})
    for old, new in [
        ("0, 35", "0, 34"),
        ("0, 35", "-1, 36"),
        ('left="4"', 'left="14"'),
        ('top="3"', 'top="-3"'),
        ('width="7"', ""),
    ]:
        source.write_text(text.replace("</image>", f"{good.replace(old, new)}</image>"))
        with pytest.raises(ValueError, match=r"images.xml, picture v/5.png: a mask (cannot be read|has no)"):
            import_dataset(source, "cvat-images", tmp_path / "bad", options=options)


def test_what_is_no_area_is_counted(tmp_path):
    source, options = made("cvat-images", tmp_path)
    source.write_text(source.read_text().replace("</image>", '<box label="car" xtl="1"/></image>'))
    report = import_dataset(source, "cvat-images", tmp_path / "a", val_videos=0, options=options)
    assert report.noticed["shapes of kind box, left out"] == 1
    with pytest.raises(ValueError, match=r'images.xml holds <image>; is it "CVAT for images"'):
        import_dataset(source, "cvat-video", tmp_path / "b", options=options)
    source, options = made("label-studio", tmp_path)
    tasks = json.loads(source.read_text())
    tasks[0]["annotations"][0]["result"].append({"type": "rectanglelabels", "value": {"rectanglelabels": ["car"]}})
    source.write_text(json.dumps(tasks))
    report = import_dataset(source, "label-studio", tmp_path / "c", val_videos=0, options=options)
    assert report.noticed["regions of kind rectanglelabels, left out"] == 1


def test_masks_of_labelme(tmp_path):
    """Its AI tools store a PNG of the box."""
    source, options = made("labelme", tmp_path)
    content = json.loads((source / "v/5.json").read_text())
    buffer = io.BytesIO()
    Image.fromarray(np.ones((5, 7), bool)).save(buffer, format="PNG")
    code = base64.b64encode(buffer.getvalue()).decode()
    content["shapes"][1] = {"label": "car", "points": [[4, 3], [10, 7]], "shape_type": "mask", "mask": code}
    (source / "v/5.json").write_text(json.dumps(content))
    import_dataset(source, "labelme", tmp_path / "out", val_videos=0, options=options)
    check(tmp_path / "out", {("v", "5"): truth()})
    for change in ({"mask": code[:20]}, {"points": [[4, 3], [11, 7]]}, {"points": [[14, 3], [20, 7]]}, {"mask": None}):
        broken = {**content, "shapes": [content["shapes"][0], {**content["shapes"][1], **change}]}
        (source / "v/5.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=r"5.json: a mask"):
            import_dataset(source, "labelme", tmp_path / "bad", options=options)


def test_a_failed_import_leaves_nothing(tmp_path):
    source, options = made("ids", tmp_path)
    values_png(source / "v/6.png", truth(), 255)
    with pytest.raises(FileNotFoundError, match=r"6.png names the picture v/6.png, which is not in"):
        import_dataset(source, "ids", tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
    picture(tmp_path / "pictures/v/6.png")
    import_dataset(source, "ids", tmp_path / "out", val_videos=0, options=options)
    assert (tmp_path / "out/dataset.py").is_file()


def test_frames_of_several_sizes_are_counted(tmp_path):
    source, options = made("ids", tmp_path)
    picture(tmp_path / "pictures/v/6.png", size=(W + 3, H))
    values_png(source / "v/6.png", np.zeros((H, W + 3), np.int32), 255)
    report = import_dataset(source, "ids", tmp_path / "out", val_videos=0, options=options)
    assert report.noticed["videos whose labelled frames differ in size"] == 1


def test_colours_by_name_from_json_tables(tmp_path):
    """Mapillary's config and COCO's categories serve as tables of colours, too."""
    source, options = made("colors", tmp_path)
    entries = [{"name": name, "color": list(color)} for name, color in [*zip(NAMES, COLORS), ("void", (0, 0, 0))]]
    for number, content in enumerate(({"labels": entries}, {"categories": entries}, entries)):
        table = tmp_path / f"table{number}.json"
        table.write_text(json.dumps(content))
        import_dataset(source, "colors", tmp_path / f"out{number}", val_videos=0, options={**options, "table": table})
        assert check(tmp_path / f"out{number}", {("v", "5"): truth()})["names"] == NAMES
    for junk in ("[1]", "{}", '[{"name": "a", "color": [1, 2]}]', '[{"name": "a", "color": [1, 2, 300]}]', "{"):
        table.write_text(junk)
        with pytest.raises(ValueError, match=r"table2.json"):
            import_dataset(source, "colors", tmp_path / "bad", options={**options, "table": table})


def test_classes_of_ade_that_are_asked_for(tmp_path):
    source, _ = made("ade", tmp_path)
    report = import_dataset(source, "ade", tmp_path / "out", val_videos=0, options={"names": ["car"]})
    check(tmp_path / "out", {("5", "5"): np.where(truth() == 1, 0, -1)})
    assert report.noticed["pixels of classes that are not asked for"] == (truth() == 0).sum()
    import_dataset(source, "ade", tmp_path / "all", val_videos=0)
    # By their numbers: 401 before 2977.
    assert json.loads((tmp_path / "all/classes.json").read_text())["names"] == ["car", "road"]


def test_ade_against_datumaro(tmp_path):
    datumaro = pytest.importorskip("datumaro")
    source, options = made("ade", tmp_path)
    content = json.loads((source / "5.json").read_text("latin-1"))
    for item in content["annotation"]["object"]:
        fields = {"parts": {"part_level": 0}, "polygon": {"x": [], "y": []}, "attributes": [], "occluded": "no"}
        item.update(fields, crop=0, instance_mask="none.png", raw_name=item["name"])
    (tmp_path / "release/training").mkdir(parents=True)
    for suffix in (".jpg", "_seg.png"):
        (tmp_path / f"release/training/5{suffix}").write_bytes((source / f"5{suffix}").read_bytes())
    (tmp_path / "release/training/5.json").write_text(json.dumps(content))
    items = datumaro.Dataset.import_from(str(tmp_path / "release"), "ade20k2020")
    names = [category.name for category in items.categories()[datumaro.AnnotationType.label].items]
    read = np.full((H, W), -1)
    (item,) = items
    for annotation in item.annotations:
        read[annotation.image > 0] = NAMES.index(names[annotation.label])
    import_dataset(tmp_path / "release", "ade", tmp_path / "out", val_videos=0, options=options)
    ours = only_mask(tmp_path / "out")
    assert np.array_equal(np.where(ours == 255, -1, ours), read)


def test_pictures_that_do_not_follow_each_other(tmp_path):
    source, options = made("ids", tmp_path)
    picture(tmp_path / "pictures/v/6.png")
    values_png(source / "v/6.png", truth(), 255)
    report = import_dataset(source, "ids", tmp_path / "out", val_videos=0.5, options=options, stills=True)
    check(tmp_path / "out", {("v/5", "5"): truth(), ("v/6", "6"): truth()})
    assert report.videos == 2
    assert (tmp_path / "out/train.txt").read_text() == "v/5\n"
