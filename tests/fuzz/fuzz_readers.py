"""Every reader of untrusted files, each with valid files to mutate.

Whatever a file contains, its reader returns a result or raises a ``ValueError`` or ``FileNotFoundError`` that names the
file, within seconds and in little memory. Everything else is a finding.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import av
import fuzz_mutation as damage
import numpy as np
import torch
import yaml
from fuzz_mutation import Mutation
from PIL import Image
from safetensors.torch import save as save_safetensors
from torch import nn

from the_mask.config import load_config
from the_mask.config.strict_yaml import parse_yaml
from the_mask.data import register_video_tree
from the_mask.data.clips import Clip
from the_mask.data.files import read_json
from the_mask.data.importers import FORMATS, import_dataset
from the_mask.data.io import (
    animation,
    count_pictures,
    exif_orientation,
    read_image,
    read_label,
    read_label_raw,
    read_palette,
)
from the_mask.data.video_tree import scan_video_tree
from the_mask.engine.trackers import known_runs
from the_mask.engine.writers import MetricsWriter, prepare_metrics_file, recorded_names
from the_mask.evaluation.predictions import evaluate_predictions
from the_mask.inference.live.sources import open_source
from the_mask.inference.mask_generators import StoredMasks
from the_mask.inference.runtimes.cache import RuntimeCache
from the_mask.inference.saved_scores import SavedScores, ScoreWriter, read_index
from the_mask.modeling.feature_cache import FeatureCache
from the_mask.modeling.propagation.score_cache import ScoreCache
from the_mask.models import parse_card
from the_mask.weights.checkpoint import CheckpointFolder, read_checkpoint
from the_mask.weights.loading import load_weights
from the_mask.weights.pretrained import read_pretrained

H, W = 12, 20
CLASSES = ["road", "car"]
Read = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One reader: the file it reads, valid contents of the file, and the call."""

    path: Path
    seeds: Sequence[bytes]
    read: Read


@dataclass(frozen=True)
class Reader:
    """How a reader is set up in a folder, and how its files are mutated."""

    prepare: Callable[[Path], Case]
    mutate: Mutation = damage.mutate_bytes


# Pictures and videos.


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An encoded picture."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(seed: int = 0) -> Image.Image:
    """A picture [H, W, 3] of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (H, W, 3), dtype=np.uint8))


def truth() -> np.ndarray:
    """A label map: class ids, uint8."""
    labels = np.zeros((H, W), np.uint8)
    labels[3:8, 4:11] = 1
    return labels


def pngs(labels_only: bool = False) -> list[bytes]:
    """PNGs of several kinds."""
    grey, palette = Image.fromarray(truth()), Image.fromarray(truth(), "P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    exif = Image.Exif()
    exif[0x0112] = 6
    found = [encoded(image, "PNG") for image in (grey, palette, grey.convert("I;16"))]
    if labels_only:
        return found
    found += [encoded(image, "PNG") for image in (pixels(), pixels().convert("RGBA"), grey.convert("1"))]
    found.append(encoded(pixels(), "PNG", exif=exif, icc_profile=b"x" * 200))
    found.append(encoded(pixels(), "PNG", save_all=True, append_images=[pixels(1)], duration=50))
    return found


def _picture(folder: Path) -> Case:
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = [pixels(), pixels(1)]
    animated = {"save_all": True, "append_images": pictures[1:], "duration": 50}
    seeds = [
        *pngs(),
        *(encoded(pixels(), "JPEG", exif=exif, icc_profile=b"x" * 100, progressive=p) for p in (False, True)),
        *(encoded(image, "BMP") for image in (pixels(), Image.fromarray(truth()), pixels().convert("P"))),
        *(encoded(pixels(), "TIFF", compression=c) for c in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")),
        encoded(pixels(), "TIFF", save_all=True, append_images=pictures[1:]),
        encoded(Image.fromarray(truth()), "TIFF"),
        encoded(pixels(), "WEBP", lossless=True, exif=exif),
        encoded(pixels(), "WEBP", **animated),
        encoded(pixels().convert("P"), "GIF", **animated),
    ]
    path = folder / "picture.png"

    def read() -> None:
        for call in (read_image, read_label_raw, exif_orientation, count_pictures, read_palette, _play):
            try:
                call(path)
            except ValueError as error:  # a colour picture is not a mask
                if path.name not in str(error):
                    raise

    return Case(path, seeds, read)


def _play(path: Path) -> None:
    for _ in islice(animation(path), 50):
        pass


def mutate_picture(dice: Random, data: bytes) -> bytes:
    """Mutate PNGs by their chunks, other files by their bytes."""
    return damage.mutate_png(dice, data) if data.startswith(b"\x89PNG") else damage.mutate_bytes(dice, data)


def video(kind: str, codec: str, sound: bool = False) -> bytes:
    """A video of six frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        tone: Any = container.add_stream("mp2", rate=44100) if sound else None
        for number in range(6):
            image = np.full((48, 64, 3), 40 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
        if tone is not None:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 1152), np.int16), format="s16", layout="stereo")
            frame.sample_rate = 44100
            container.mux(tone.encode(frame))
            container.mux(tone.encode())
    return buffer.getvalue()


def _video(folder: Path) -> Case:
    kinds = [("mp4", "libx264"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("mpegts", "libx264"), ("mov", "libx264")]
    seeds = [video(*kind) for kind in kinds if kind[1] in av.codecs_available]
    path = folder / "video.mp4"

    def read() -> None:
        with open_source(path, on_problem=lambda text: None) as source:
            frames = source.timed()
            for _ in islice(frames, 40):
                pass
            source.seek(0.3)
            for _ in islice(frames, 10):
                pass

    return Case(path, seeds, read)


# Configs and cards.

CONFIG = """_BASE_: base.yaml
MODEL: &model
  META_ARCHITECTURE: MaskClassifier
  PIXEL_MEAN: [1.0, 2.0, 3.5]
SOLVER: {BASE_LR: 0.1, STEPS: [3, 4], MAX_ITER: 10}
DATASETS:
  TRAIN: ["a", 'b']
  TEST: !!seq [c]
TEST: {VC_WINDOWS: [8, 16]}
"""
YAML_TOKENS = (
    *(b"&a ", b"*a ", b"<<: *model\n", b"!!python/object/apply:os.system ", b"!!binary ", b"!!set ", b"!!omap "),
    *(b"? ", b"- ", b": ", b"---\n", b"...\n", b"%YAML 1.1\n", b"| \n", b"{", b"[", b"\t", b"~", b"!!timestamp "),
    *(b"_BASE_: [x, y]\n", b"VERSION: 2\n", b"MODEL:\n", b"1_000", b"1:30", b"0o17", b".inf", b"!!int '' ", b"= "),
)


def mutate_yaml(dice: Random, data: bytes) -> bytes:
    """Mutate values of the tree, or bytes and words of the YAML."""
    if dice.randrange(2):
        return damage.mutate_bytes(dice, data, YAML_TOKENS)
    try:
        tree = yaml.safe_load(data)
        return yaml.safe_dump(damage.mutate_structure(dice, tree)).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, AttributeError, UnicodeError):
        return damage.mutate_bytes(dice, data, YAML_TOKENS)


def _yaml(folder: Path) -> Case:
    path = folder / "some.yaml"
    return Case(path, [CONFIG.encode(), b"a: [1, {b: c}]\n"], lambda: parse_yaml(path.read_bytes(), str(path)))


def _config(folder: Path) -> Case:
    (folder / "base.yaml").write_text("SOLVER: {IMS_PER_BATCH: 2}\n")
    path = folder / "some.yaml"
    good = CONFIG
    return Case(path, [good.encode(), good.split("SOLVER")[0].encode()], lambda: load_config(path))


CARD = """---
summary: a model
sha256: {digest}
classes: [road, car]
colors: [[0, 0, 0], [1, 2, 3]]
metrics: {{mIoU: 50.1}}
---
Prose.
"""


def _card(folder: Path) -> Case:
    path = folder / "README.md"

    def read() -> None:
        parse_card(str(path), path.read_text(encoding="utf-8", errors="replace"))

    return Case(path, [CARD.format(digest="0" * 64).encode()], read)


def _pretrained(folder: Path) -> Case:
    import hashlib

    weights = save_safetensors({"w": torch.ones(2)})
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "README.md").write_text(CARD.format(digest=hashlib.sha256(weights).hexdigest()))
    path = folder / "config.yaml"
    good = CONFIG.replace("_BASE_: base.yaml\n", "")
    return Case(path, [good.encode()], lambda: read_pretrained(folder))


# Weights and checkpoints.


def torch_file(content: Any, old: bool = False) -> bytes:
    """A file of ``torch.save``."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


ODD_TENSORS = (torch.zeros(0), torch.ones(3), torch.tensor(5), torch.full((8,), float("nan")), torch.ones(2, 2, 2))


def mutate_torch(dice: Random, data: bytes) -> bytes:
    """Mutate the content of a torch file, its pickle, or its bytes."""
    kind = dice.randrange(4)
    if kind == 0 or not data.startswith(b"PK"):
        return damage.mutate_bytes(dice, data, PICKLE_TOKENS)
    if kind == 1:
        return damage.mutate_zip(dice, data, lambda d, inner: damage.mutate_bytes(d, inner, PICKLE_TOKENS))
    try:
        content = torch.load(io.BytesIO(data), weights_only=True)
    except (
        RuntimeError,
        pickle.UnpicklingError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
    ):
        return damage.mutate_zip(dice, data)
    return torch_file(damage.mutate_structure(dice, content, (*damage.ODD, *ODD_TENSORS)))


PICKLE_TOKENS = (
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"cbuiltins\nset\n"),
    *(b"ccollections\nOrderedDict\n", b"cos\nsystem\n", b"c_codecs\nencode\n", b"ctorch\nFloatStorage\n"),
    *(
        b"R",
        b"b",
        b"}",
        b"]",
        b"(",
        b"t",
        b"u",
        b"s",
        b".",
        b"\x85",
        b"\x86",
        b"\x87",
        b"q\x00",
        b"h\x00",
        b"Q",
        b"K\x01",
    ),
    *(b"\x8a\x08", b"\x80\x02", b"\x95\xff\xff\xff\xff\xff\xff\xff\x0f", b"\x81", b"\x93", b"\x90"),
)


def _states() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in nn.Linear(3, 2).state_dict().items()}


def _weights(folder: Path) -> Case:
    path = folder / "weights.pth"
    state = _states()
    arrays = {name: value.numpy() for name, value in state.items()}
    seeds = [
        torch_file(state),
        torch_file({"model": state, "iteration": 3, "class_names": CLASSES}),
        torch_file({"state_dict": {f"module.{name}": value.half() for name, value in state.items()}}),
        torch_file({"model": state, "ema": {"average": state}}),
        torch_file(state, old=True),
        save_safetensors(state, {"class_names": json.dumps(CLASSES)}),
        *(pickle.dumps({"model": arrays, "x": [1, (2.5, None), {3}]}, protocol=p) for p in (0, 2, 4)),
    ]
    return Case(path, seeds, lambda: load_weights(nn.Linear(3, 2), path))


def _index(folder: Path) -> Case:
    (folder / "a.safetensors").write_bytes(save_safetensors({"weight": torch.ones(2, 3)}))
    (folder / "b.safetensors").write_bytes(save_safetensors({"bias": torch.ones(2)}))
    path = folder / "model.safetensors.index.json"
    content = {"metadata": {"total_size": 1}, "weight_map": {"weight": "a.safetensors", "bias": "b.safetensors"}}
    return Case(path, [json.dumps(content).encode()], lambda: load_weights(nn.Linear(3, 2), path))


def _checkpoint(folder: Path) -> Case:
    path = folder / "model_0000001.pth"
    state = {"model": _states(), "iteration": 1, "numbered": []}
    index = {"count": 1, "paths": ["model/weight"], "token": "0123abcd"}
    (folder / "model_0000001.pth.0123abcd.part0of1").write_bytes(torch_file({"parts": {"model/weight": torch.ones(2)}}))
    seeds = [torch_file(state), torch_file({**state, "parts_elsewhere": index})]
    return Case(path, seeds, lambda: read_checkpoint(path))


def _pointer(folder: Path) -> Case:
    (folder / "model_0000001.pth").write_bytes(torch_file({"model": _states()}))
    path = folder / "last_checkpoint"
    return Case(path, [b"model_0000001.pth", b"gone.pth"], lambda: CheckpointFolder(folder).last())


def _resume(folder: Path) -> Case:
    """Resume a training from the checkpoint, to its end."""
    from engine_fakes import fake_cfg, variant

    def cfg() -> Any:
        return fake_cfg(folder, "SOLVER.MAX_ITER", 3, "SOLVER.EMA.ENABLED", True, "SOLVER.CHECKPOINT_PERIOD", 2)

    def clean() -> None:
        for other in folder.iterdir():
            if other != path and other.is_file():
                other.unlink()

    path = folder / "model_0000001.pth"
    variant(noise=0.1)(cfg()).train()
    seed = path.read_bytes()

    def read() -> None:
        clean()
        trainer = variant(noise=0.1)(cfg())
        trainer.resume_or_load(resume=True)
        if trainer.start_iter < 3:
            trainer.train()

    return Case(path, [seed], read)


def _feature_cache(folder: Path) -> Case:
    backbone = nn.Conv2d(3, 2, 1)
    image = torch.zeros(1, 3, 4, 4)

    def features() -> object:
        cache = FeatureCache(folder, 1 << 20)
        return cache.features(backbone, lambda x: {"res2": backbone(x), "res3": x}, image)

    features()
    path = next(folder.glob("*/*.safetensors"))
    return Case(path, [path.read_bytes()], features)


def _feature_manifest(folder: Path) -> Case:
    backbone = nn.Conv2d(3, 2, 1)
    path = FeatureCache(folder, 1 << 20).open(backbone) / "features.json"
    return Case(path, [path.read_bytes()], lambda: FeatureCache(folder, 1 << 20).open(backbone))


def _score_cache(folder: Path) -> Case:
    segmentor = nn.Linear(2, 2)
    clip = Clip(dataset="d", video_id="v", frame_ids=["0"], frames=[torch.zeros(3, 4, 4)])
    cache = ScoreCache(folder)
    cache.write(clip, 0, torch.zeros(2, 2, 2))
    path = folder / "d/v/0.pt"

    def read() -> None:
        scores = cache.read(clip, 0, segmentor)
        assert scores is None or (isinstance(scores, torch.Tensor) and scores.dim() == 3)

    return Case(path, [path.read_bytes()], read)


# Predictions and other files of runs.


def _prediction(folder: Path) -> Case:
    tree = folder / "tree"
    for part in ("origin", "mask"):
        (tree / "data/v" / part).mkdir(parents=True)
    pixels().save(tree / "data/v/origin/0.png")
    Image.fromarray(truth()).save(tree / "data/v/mask/0.png")
    (tree / "train.txt").write_text("v\n")
    register_video_tree("fuzz_prediction", tree, "train", CLASSES)
    path = folder / "predictions/v/0.png"
    path.parent.mkdir(parents=True)

    def read() -> None:
        evaluate_predictions(path.parent.parent, "fuzz_prediction", progress=False)
        read_label(path, [0, 1, 255])

    return Case(path, pngs(labels_only=True), read)


def _video_list(folder: Path) -> Case:
    for part in ("origin", "mask"):
        (folder / "data/v" / part).mkdir(parents=True)
    pixels().save(folder / "data/v/origin/0.png")
    Image.fromarray(truth()).save(folder / "data/v/mask/0.png")
    path = folder / "train.txt"
    path.write_text("v\n")
    tree = register_video_tree("fuzz_list", folder, "train", CLASSES)
    return Case(path, [b"v\n", "a/v\r\nvidéo\n".encode()], lambda: scan_video_tree(tree))


def _scores(folder: Path) -> Case:
    writer = ScoreWriter(folder, CLASSES)
    path = writer.write(("v", "0"), torch.rand(2, H, W))
    return Case(path, [path.read_bytes()], lambda: SavedScores(folder).read(("v", "0"), (H, W)))


def _score_index(folder: Path) -> Case:
    ScoreWriter(folder, CLASSES)
    path = folder / "scores.json"
    return Case(path, [path.read_bytes()], lambda: read_index(folder))


def _stored_masks(folder: Path) -> Case:
    from pycocotools import mask as coco

    path = folder / "v/0.json"
    path.parent.mkdir()
    image = np.zeros((H, W, 3), np.uint8)
    compressed = coco.encode(np.asfortranarray(truth()))
    record = {"size": [H, W], "counts": compressed["counts"].decode()}
    plain = {"size": [H, W], "counts": [100, 40, H * W - 140]}
    seeds = [json.dumps([record, plain]).encode(), json.dumps([{"segmentation": plain, "area": 40}]).encode()]

    def read() -> None:
        for mask in StoredMasks(folder).masks(image, ("v", "0")):
            assert coco.decode(mask).shape == (H, W)

    return Case(path, seeds, read)


def _runtime_choice(folder: Path) -> Case:
    cache = RuntimeCache(folder)
    cache.keep_choice("x", "eager", {"part": "p", "seconds": {"eager": 1.5}})
    path = cache.folder / "x.json"

    def read() -> None:
        assert isinstance(cache.choice("x"), str | None)

    return Case(path, [path.read_bytes()], read)


def _metrics(folder: Path) -> Case:
    path = folder / "metrics.json"
    lines = [json.dumps({"iteration": i, "total_loss": 0.5, "lr": float("nan")}) for i in range(4)]

    def read() -> None:
        prepare_metrics_file(folder, 3)
        MetricsWriter(path).close()
        recorded_names(folder, 1)

    return Case(path, ["\n".join(lines).encode(), lines[0].encode()], read)


def _tracker_runs(folder: Path) -> Case:
    path = folder / "trackers.json"
    return Case(path, [b'{"wandb": "abc", "mlflow": "def"}'], lambda: known_runs(path))


def _any_json(folder: Path) -> Case:
    path = folder / "some.json"
    return Case(path, [b'{"a": [1, 2.5, "x", null, {"b": true}]}'], lambda: read_json(path))


# Importers.

CATEGORIES = [{"id": 10, "name": "road", "color": [1, 2, 3]}, {"id": 3, "name": "car", "color": [4, 5, 6]}]
SEGMENTS = [{"id": 70000, "category_id": 10}, {"id": 300, "category_id": 3}]
BOX = [4, 3, 11, 3, 11, 8, 4, 8]
RUNS = {"size": [H, W], "counts": [100, 40, H * W - 140]}


def compressed() -> dict[str, Any]:
    """Compressed run lengths of a mask."""
    from pycocotools import mask as coco

    code = coco.encode(np.asfortranarray(truth()))
    return {"size": code["size"], "counts": code["counts"].decode()}


def segment_png(path: Path) -> None:
    """A PNG whose colours are the ids of :data:`SEGMENTS`."""
    ids = np.where(truth() == 1, 300, 70000)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(path)


def _drain(form: str, source: Path, **options: Any) -> Read:
    def read() -> None:
        labels = FORMATS[form](source, **options)
        assert all(isinstance(name, str) for name in labels.names)
        for color in labels.colors or ():
            assert len(color) == 3
            assert all(type(value) is int and 0 <= value <= 255 for value in color), color
        for frame in islice(labels.frames, 50):
            assert isinstance(frame.video, str)
            if frame.labels is not None:
                assert frame.labels.ndim == 2  # compared with the picture's size when it is written
                assert frame.labels.max() < len(labels.names)

    return read


def _json_import(form: str, *contents: Any, file: str = "a.json", **options: str) -> Callable[[Path], Case]:
    def prepare(folder: Path) -> Case:
        for name in ("v/5.jpg", "JPEGImages/v/5.jpg", "5.jpg"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            pixels().save(folder / name)
        segment_png(folder / "a/v_5.png")
        segment_png(folder / "a/v/5.png")
        source = folder / file
        source.parent.mkdir(parents=True, exist_ok=True)
        seeds = [json.dumps(content).encode() for content in contents]
        root = source.parent if form == "labelme" else source
        return Case(source, seeds, _drain(form, root, **{k: folder / v for k, v in options.items()}))

    return prepare


COCO = {
    "images": [{"id": 7, "file_name": "v/5.jpg", "height": H, "width": W}],
    "categories": CATEGORIES,
    "annotations": [
        {"id": 0, "image_id": 7, "category_id": 10, "segmentation": compressed()},
        {"id": 1, "image_id": 7, "category_id": 3, "segmentation": [BOX]},
        {"id": 2, "image_id": 7, "category_id": 3, "segmentation": RUNS},
    ],
}
PANOPTIC = {
    "images": [{"id": 1, "file_name": "v/5.jpg"}],
    "annotations": [{"image_id": 1, "file_name": "v_5.png", "segments_info": SEGMENTS}],
    "categories": CATEGORIES,
}
VIPSEG = {
    "videos": [{"video_id": "v", "images": [{"id": "5", "file_name": "5.jpg"}]}],
    "annotations": [
        {"video_id": "v", "annotations": [{"image_id": "5", "file_name": "5.png", "segments_info": SEGMENTS}]}
    ],
    "categories": CATEGORIES,
}
YTVIS = {
    "videos": [{"id": 1, "height": H, "width": W, "file_names": ["v/5.jpg"]}],
    "annotations": [{"video_id": 1, "category_id": 10, "segmentations": [compressed()]}],
    "categories": CATEGORIES,
}
LABELME = {
    "shapes": [
        {"label": "road", "points": [[0, 6], [W, 6], [W, H]], "shape_type": "polygon"},
        {"label": "car", "points": [[4, 3], [11, 8]], "shape_type": "rectangle"},
        {"label": "car", "points": [[4, 3], [6, 3]], "shape_type": "circle"},
    ],
    "imagePath": "..\\x\\5.jpg",
    "imageHeight": H,
    "imageWidth": W,
}
# A stream of 4 * H * W values, all 255: number, bits per value, four widths, one run.
_BITS = (
    f"{4 * H * W:032b}{7:05b}" + "".join(f"{w - 1:04b}" for w in (3, 4, 8, 16)) + f"111{4 * H * W - 1:016b}{255:08b}"
)
_BITS += "0" * (-len(_BITS) % 8)
BRUSH = [int(_BITS[i : i + 8], 2) for i in range(0, len(_BITS), 8)]
LABEL_STUDIO = [
    {
        "id": 1,
        "data": {"image": "/data/upload/3/ab12cd34-5.jpg"},
        "annotations": [
            {
                "result": [
                    {
                        "type": "brushlabels",
                        "original_width": W,
                        "original_height": H,
                        "value": {"rle": BRUSH, "brushlabels": ["road"]},
                    },
                    {
                        "type": "polygonlabels",
                        "value": {"points": [[20, 25], [55, 25], [55, 70]], "polygonlabels": ["car"]},
                    },
                ],
                "updated_at": "2024-01-01",
                "was_cancelled": False,
            }
        ],
    }
]


def _cvat_video(folder: Path) -> Case:
    (folder / "images").mkdir()
    for number in range(2):
        pixels(number).save(folder / f"images/frame_{number:06d}.png")
    text = f"""<?xml version="1.0"?>
<annotations><meta><task><name>my task</name><labels>
<label><name>road</name><color>#804080</color></label><label><name>car</name><color>#00008e</color></label>
</labels></task></meta>
<track id="0" label="road"><polygon frame="0" outside="0" keyframe="1" points="0,6;{W},6;{W},{H};0,{H}" z_order="0"/>
<polygon frame="1" outside="1" keyframe="1" points="0,6;{W},6;{W},{H}" z_order="0"/></track>
<track id="1" label="car">
<mask frame="0" outside="0" rle="0,35" left="4" top="3" width="7" height="5" z_order="1"/></track>
</annotations>"""
    path = folder / "annotations.xml"
    return Case(path, [text.encode()], _drain("cvat-video", path))


def _cvat_images(folder: Path) -> Case:
    (folder / "images").mkdir()
    pixels().save(folder / "images/0.png")
    text = f"""<?xml version="1.0"?>
<annotations><meta><task><name>my task</name><labels>
<label><name>road</name><color>#804080</color></label><label><name>car</name><color>#00008e</color></label>
</labels></task></meta>
<image id="0" name="0.png" width="{W}" height="{H}"><polygon label="road" points="0,6;{W},6;{W},{H}" z_order="0"/>
<mask label="car" rle="0,35" left="4" top="3" width="7" height="5" z_order="1"/></image>
</annotations>"""
    path = folder / "annotations.xml"
    return Case(path, [text.encode()], _drain("cvat-images", path))


def _ade(folder: Path) -> Case:
    pixels().save(folder / "X.jpg")
    numbers = np.where(truth() == 1, 300, 70)
    mask = np.stack([numbers // 256 * 10, numbers % 256, numbers * 0], -1).astype(np.uint8)
    Image.fromarray(mask).save(folder / "X_seg.png")
    path = folder / "X.json"
    objects = [{"name_ndx": 300, "name": "car"}, {"name_ndx": 70, "name": "road"}]
    return Case(path, [json.dumps({"annotation": {"object": objects}}).encode()], _drain("ade", folder))


def _mapillary(folder: Path) -> Case:
    for name in ("labels", "images"):
        (folder / "training" / name).mkdir(parents=True)
    pixels().save(folder / "training/images/0.jpg")
    Image.fromarray(truth()).save(folder / "training/labels/0.png")
    path = folder / "config_v1.2.json"
    labels = [{"name": "road", "color": [1, 2, 3]}, {"name": "car", "color": [4, 5, 6]}, {"name": "void--unlabeled"}]
    labels[2]["color"] = [0, 0, 0]
    seeds = [{"labels": labels}, labels, {"names": CLASSES, "colors": [[1, 2, 3], [4, 5, 6]]}]
    return Case(path, [json.dumps(seed).encode() for seed in seeds], _drain("mapillary", folder / "training"))


def _ids(folder: Path) -> Case:
    (folder / "masks").mkdir()
    (folder / "frames").mkdir()
    pixels().save(folder / "frames/0.jpg")
    path = folder / "masks/0.png"
    return Case(path, pngs(labels_only=True), _drain("ids", folder / "masks", frames=folder / "frames", names=CLASSES))


XML_TOKENS = (
    *(str(value).encode("utf-8", "replace") for value in damage.ODD),
    *(b"<track>", b"</track>", b"<mask/>", b"<polygon/>", b'frame="9999999999"', b'frame=""', b'points=""', b'rle=""'),
    *(b'left="1e400"', b"<!DOCTYPE a>", b"<![CDATA[", b"&lt;", b'encoding="utf-16"', b"<name/>", b'z_order="x"'),
)


def _table(folder: Path) -> Case:
    (folder / "masks").mkdir()
    (folder / "frames").mkdir()
    pixels().save(folder / "frames/0.jpg")
    Image.fromarray(np.array([(128, 64, 128), (0, 0, 142)], np.uint8)[truth()]).save(folder / "masks/0.png")
    path = folder / "classes.csv"
    text = b"class,r,g,b\nroad,128,64,128\ncar,0,0,142\nvoid,0,0,0\n"
    return Case(path, [text], _drain("colors", folder / "masks", table=path))


def _labelmap(folder: Path) -> Case:
    for name in ("SegmentationClass", "JPEGImages"):
        (folder / name).mkdir()
    pixels().save(folder / "JPEGImages/0.jpg")
    Image.fromarray(np.array([(128, 64, 128), (0, 0, 142)], np.uint8)[truth()]).save(folder / "SegmentationClass/0.png")
    path = folder / "labelmap.txt"
    text = b"# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:128,64,128::\ncar:0,0,142::\n"
    return Case(path, [text], _drain("cvat-masks", folder))


def _davis(folder: Path) -> Case:
    for name in ("Annotations/480p/v", "JPEGImages/480p/v"):
        (folder / name).mkdir(parents=True)
    pixels().save(folder / "JPEGImages/480p/v/0.jpg")
    path = folder / "Annotations/480p/v/0.png"
    return Case(path, pngs(labels_only=True), _drain("davis", folder))


def _archive(folder: Path) -> Case:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.json", json.dumps(COCO))
        file.writestr("v/5.jpg", encoded(pixels(), "JPEG"))
    path = folder / "task.zip"
    count = iter(range(10**9))
    return Case(path, [buffer.getvalue()], lambda: import_dataset(path, "coco", folder / f"out{next(count)}"))


READERS: dict[str, Reader] = {
    "picture": Reader(_picture, mutate_picture),
    "video": Reader(_video),
    "yaml": Reader(_yaml, mutate_yaml),
    "config": Reader(_config, mutate_yaml),
    "card": Reader(_card, mutate_yaml),
    "pretrained": Reader(_pretrained, mutate_yaml),
    "weights": Reader(_weights, mutate_torch),
    "weights index": Reader(_index, damage.mutate_json),
    "checkpoint": Reader(_checkpoint, mutate_torch),
    "last_checkpoint": Reader(_pointer),
    "resume": Reader(_resume, mutate_torch),
    "feature cache": Reader(_feature_cache),
    "feature manifest": Reader(_feature_manifest, damage.mutate_json),
    "score cache": Reader(_score_cache, mutate_torch),
    "prediction": Reader(_prediction, mutate_picture),
    "list of videos": Reader(_video_list),
    "scores": Reader(_scores, damage.mutate_zip),
    "index of scores": Reader(_score_index, damage.mutate_json),
    "stored masks": Reader(_stored_masks, damage.mutate_json),
    "runtime choice": Reader(_runtime_choice, damage.mutate_json),
    "metrics": Reader(_metrics, damage.mutate_json),
    "tracker runs": Reader(_tracker_runs, damage.mutate_json),
    "json": Reader(_any_json, damage.mutate_json),
    "coco": Reader(_json_import("coco", COCO), damage.mutate_json),
    "panoptic": Reader(_json_import("panoptic", PANOPTIC), damage.mutate_json),
    "vipseg": Reader(_json_import("vipseg", VIPSEG), damage.mutate_json),
    "ytvis": Reader(_json_import("ytvis", YTVIS), damage.mutate_json),
    "labelme": Reader(_json_import("labelme", LABELME, file="lm/v/5.json", frames="."), damage.mutate_json),
    "label-studio": Reader(_json_import("label-studio", LABEL_STUDIO), damage.mutate_json),
    "cvat-video": Reader(_cvat_video, lambda dice, data: damage.mutate_bytes(dice, data, XML_TOKENS)),
    "cvat-images": Reader(_cvat_images, lambda dice, data: damage.mutate_bytes(dice, data, XML_TOKENS)),
    "cityscapes-vps": Reader(_json_import("cityscapes-vps", PANOPTIC), damage.mutate_json),
    "ade": Reader(_ade, damage.mutate_json),
    "mapillary": Reader(_mapillary, damage.mutate_json),
    "ids": Reader(_ids, mutate_picture),
    "colors": Reader(_table),
    "cvat-masks": Reader(_labelmap),
    "davis": Reader(_davis, mutate_picture),
    "archive": Reader(_archive, damage.mutate_zip),
}
