"""One labelled frame in every imported format: :data:`SHAPES` draws polygons, :data:`MASKS` pictures of classes."""

import json
from xml.sax.saxutils import quoteattr

import numpy as np
from importer_fixtures import COLORS, NAMES, H, W, picture, segments_png, truth
from PIL import Image

from the_mask.data.importers import import_dataset

CAR = [4, 3, 11, 3, 11, 8, 4, 8]
ROAD = [0, 6, W, 6, W, H, 0, H]
PLAIN = [("road", ROAD), ("car", CAR)]


def pairs(polygon):
    return [[polygon[i], polygon[i + 1]] for i in range(0, len(polygon), 2)]


def categories(names):
    return [{"id": 10 + i, "name": name, "color": list(COLORS[i % 2])} for i, name in enumerate(names)]


def category(names, name):
    return 10 + names.index(name) if name in names else 99


def coco(folder, shapes, names):
    annotations = [
        {"id": i, "image_id": 1, "category_id": category(names, name), "segmentation": [polygon]}
        for i, (name, polygon) in enumerate(shapes)
    ]
    images = [{"id": 1, "file_name": "v/5.png", "height": H, "width": W}]
    content = {"images": images, "annotations": annotations, "categories": categories(names)}
    (folder / "coco.json").write_text(json.dumps(content))
    return folder / "coco.json", {"frames": folder / "pictures"}


def ytvis(folder, shapes, names):
    annotations = [
        {"video_id": 1, "category_id": category(names, name), "segmentations": [[polygon]]} for name, polygon in shapes
    ]
    videos = [{"id": 1, "file_names": ["v/5.png"], "height": H, "width": W}]
    content = {"videos": videos, "annotations": annotations, "categories": categories(names)}
    (folder / "ytvis.json").write_text(json.dumps(content))
    return folder / "ytvis.json", {"frames": folder / "pictures"}


def labelme(folder, shapes, names):
    (folder / "labelme/v").mkdir(parents=True)
    items = [{"label": name, "points": pairs(polygon), "shape_type": "polygon"} for name, polygon in shapes]
    content = {"shapes": items, "imagePath": "5.png", "imageHeight": H, "imageWidth": W}
    (folder / "labelme/v/5.json").write_text(json.dumps(content))
    return folder / "labelme", {"frames": folder / "pictures", "names": names}


def label_studio(folder, shapes, names):
    result = [
        {
            "type": "polygonlabels",
            "original_height": H,
            "original_width": W,
            "value": {"points": [[100 * x / W, 100 * y / H] for x, y in pairs(polygon)], "polygonlabels": [name]},
        }
        for name, polygon in shapes
    ]
    tasks = [{"id": 1, "data": {"image": "/data/upload/1/5.png"}, "annotations": [{"result": result}]}]
    (folder / "v.json").write_text(json.dumps(tasks))
    return folder / "v.json", {"frames": folder / "pictures/v", "names": names}


def cvat_meta(names):
    labels = "".join(
        f"<label><name>{name}</name><color>#{r:02x}{g:02x}{b:02x}</color></label>"
        for name, (r, g, b) in zip(names, [*COLORS, *COLORS])
    )
    size = f"<original_size><width>{W}</width><height>{H}</height></original_size>"
    return f"<meta><task><name>v</name><labels>{labels}</labels>{size}</task></meta>"


def points(polygon):
    return ";".join(f"{x},{y}" for x, y in pairs(polygon))


def cvat_images(folder, shapes, names):
    # The order in the file is not that of drawing.
    items = [
        f'<polygon label={quoteattr(name)} points="{points(polygon)}" z_order="{z}"/>'
        for z, (name, polygon) in enumerate(shapes)
    ]
    image = f'<image id="0" name="v/5.png" width="{W}" height="{H}">{"".join(reversed(items))}</image>'
    (folder / "images.xml").write_text(f"<annotations>{cvat_meta(names)}{image}</annotations>")
    return folder / "images.xml", {"frames": folder / "pictures"}


def cvat_video(folder, shapes, names):
    tracks = "".join(
        f"<track label={quoteattr(name)}>"
        f'<polygon frame="5" outside="0" points="{points(polygon)}" z_order="{z}"/></track>'
        for z, (name, polygon) in enumerate(shapes)
    )
    (folder / "video.xml").write_text(f"<annotations>{cvat_meta(names)}{tracks}</annotations>")
    return folder / "video.xml", {"frames": folder / "pictures/v"}


def values_png(path, labels, nothing, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.where(labels < 0, nothing, labels).astype(np.uint8))
    if mode == "P":
        image.putpalette([value for color in [*COLORS, (0, 0, 0)] for value in color])
    image.save(path)


def ids(folder, labels, names):
    values_png(folder / "ids/v/5.png", labels, 255)
    (folder / "ids/classes.json").write_text(json.dumps({"names": names, "colors": [*COLORS, *COLORS][: len(names)]}))
    return folder / "ids", {"frames": folder / "pictures"}


def colors(folder, labels, names):
    (folder / "colors/v").mkdir(parents=True)
    table = np.array([*COLORS, (9, 9, 9), (0, 0, 0)], np.uint8)
    Image.fromarray(table[labels]).save(folder / "colors/v/5.png")
    rows = [f"{name},{r},{g},{b}" for name, (r, g, b) in zip(names, [*COLORS, (7, 7, 7)])]
    (folder / "colors/classes.csv").write_text("\n".join([*rows, "void,0,0,0"]))
    return folder / "colors", {"frames": folder / "pictures"}


def cvat_masks(folder, labels, names):
    (folder / "v/SegmentationClass").mkdir(parents=True)
    table = np.array([*COLORS, (9, 9, 9), (0, 0, 0)], np.uint8)
    Image.fromarray(table[labels]).save(folder / "v/SegmentationClass/5.png")
    rows = [f"{name}:{r},{g},{b}::" for name, (r, g, b) in zip(names, [*COLORS, (7, 7, 7)])]
    (folder / "v/labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", "background:0,0,0::", *rows]))
    return folder / "v", {"frames": folder / "pictures/v"}


def davis(folder, labels, names):
    values_png(folder / "davis/Annotations/480p/v/5.png", labels + 1, 255, "P")
    return folder / "davis", {"frames": folder / "pictures", "names": names}


def mapillary(folder, labels, names):
    values_png(folder / "training/v2.0/labels/5.png", labels, len(names), "P")
    entries = [{"name": name, "color": list(color)} for name, color in zip(names, [*COLORS, (7, 7, 7)])]
    entries += [{"name": "void--unlabeled", "color": [0, 0, 0]}]
    (folder / "config_v2.0.json").write_text(json.dumps({"labels": entries}))
    return folder / "training", {"frames": folder / "pictures/v"}


def ade(folder, labels, names):
    numbers = {0: 2977, 1: 401, 2: 3000}
    pixels = np.zeros((H, W, 3), np.uint8)
    for label, number in numbers.items():
        pixels[labels == label] = number // 256 * 10, number % 256, 3
    (folder / "ade").mkdir()
    Image.fromarray(pixels).save(folder / "ade/5_seg.png")
    objects = [{"id": i, "name_ndx": numbers[i], "name": name, "raw_name": "caf\xe9"} for i, name in enumerate(names)]
    text = json.dumps({"annotation": {"object": objects}}, ensure_ascii=False)
    (folder / "ade/5.json").write_bytes(text.encode("latin-1"))
    Image.open(folder / "pictures/v/5.png").save(folder / "ade/5.jpg")
    # Numbers do not follow the order of the names here.
    return folder / "ade", {"names": names}


def segments(labels, names):
    kinds = {0: 70000, 1: 300, 2: 5}
    info = [{"id": kinds[int(i)], "category_id": 10 + int(i)} for i in np.unique(labels) if 0 <= i < len(names)]
    return kinds, info


def panoptic(folder, labels, names):
    kinds, info = segments(labels, names)
    segments_png(folder / "pan/a.png", labels, kinds)
    content = {
        "images": [{"id": 1, "file_name": "v/5.png"}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": info}],
        "categories": categories(names),
    }
    (folder / "pan.json").write_text(json.dumps(content))
    return folder / "pan.json", {"frames": folder / "pictures"}


def cityscapes_vps(folder, labels, names):
    """Names of the release: video, frame, city, sequence, frame."""
    kinds, info = segments(labels, names)
    name = "0005_0025_frankfurt_000000_001736"
    segments_png(folder / f"pan/{name}_final_mask.png", labels, kinds)
    (folder / "pictures/v/5.png").rename(folder / f"pictures/{name}_newImg8bit.png")
    content = {
        "images": [{"id": name, "file_name": f"{name}_newImg8bit.png"}],
        "annotations": [{"image_id": name, "file_name": f"{name}_final_mask.png", "segments_info": info}],
        "categories": categories(names),
    }
    (folder / "vps.json").write_text(json.dumps(content))
    return folder / "vps.json", {"frames": folder / "pictures", "masks": folder / "pan"}


def vipseg(folder, labels, names):
    kinds, info = segments(labels, names)
    segments_png(folder / "masks/v/a.png", labels, kinds)
    content = {
        "videos": [{"video_id": "v", "images": [{"id": "5", "file_name": "5.png"}]}],
        "annotations": [
            {"video_id": "v", "annotations": [{"image_id": "5", "file_name": "a.png", "segments_info": info}]}
        ],
        "categories": categories(names),
    }
    (folder / "vip.json").write_text(json.dumps(content))
    return folder / "vip.json", {"frames": folder / "pictures", "masks": folder / "masks"}


SHAPES = {
    "coco": coco,
    "ytvis": ytvis,
    "labelme": labelme,
    "label-studio": label_studio,
    "cvat-images": cvat_images,
    "cvat-video": cvat_video,
}
MASKS = {
    "ids": ids,
    "colors": colors,
    "cvat-masks": cvat_masks,
    "davis": davis,
    "mapillary": mapillary,
    "ade": ade,
    "panoptic": panoptic,
    "cityscapes-vps": cityscapes_vps,
    "vipseg": vipseg,
}
# What a format calls the only frame.
VIDEO = {"mapillary": ("labels/5", "5"), "ade": ("5", "5")}
VIDEO["cityscapes-vps"] = ("0005", "0005_0025_frankfurt_000000_001736_newImg8bit")
VIDEO["cvat-video"] = ("v", "000005")


def made(form, folder, names=NAMES, shapes=PLAIN, labels=None, size=(W, H)):
    folder.mkdir(exist_ok=True)
    picture(folder / "pictures/v/5.png", size=size)
    if form in SHAPES:
        return SHAPES[form](folder, shapes, names)
    return MASKS[form](folder, truth() if labels is None else labels, names)


def load(form, folder, output="out", **given):
    source, options = made(form, folder, **given)
    return import_dataset(source, form, folder / output, val_videos=0, options=options)
