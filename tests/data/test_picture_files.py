"""Picture files by depth, format, orientation and size, against what was stored bit by bit."""

import io
import itertools
import re
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import the_mask
from the_mask.data import get_records, register_image_tree
from the_mask.data.check import check_dataset
from the_mask.data.io import (
    animation,
    check_same_size,
    count_pictures,
    exif_orientation,
    read_image,
    read_label_raw,
)
from the_mask.data.registry import registered_tree

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
# Every combination that the PNG standard allows.
PNG_KINDS = [
    *itertools.product([GREY], [1, 2, 4, 8, 16]),
    *itertools.product([RGB, GREY_ALPHA, RGBA], [8, 16]),
    *itertools.product([PALETTE], [1, 2, 4, 8]),
]


def packed(samples, depth, big_endian=True):
    """Rows of samples [H, W, C], each row filled up to whole bytes."""
    if depth == 16 and not big_endian:
        return [row.astype("<u2").tobytes() for row in samples]
    bits = ((samples[..., None] >> np.arange(depth - 1, -1, -1)) & 1).reshape(len(samples), -1)
    return [np.packbits(row).tobytes() for row in bits]


def write_png(path, samples, depth, colour, palette=None):
    """A PNG made from the standard alone; Pillow cannot write most of its kinds."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = samples.shape[:2]
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    if palette is not None:
        data += chunk(b"PLTE", palette.tobytes())
    rows = b"".join(b"\0" + row for row in packed(samples, depth))
    path.write_bytes(data + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def write_tiff(path, samples, depth, photometric):
    """A TIFF of one strip; ``photometric`` 0: zero is white, 1: zero is black, 2: RGB."""
    data = b"".join(packed(samples, depth, big_endian=False))
    height, width, channels = samples.shape
    tags = [(256, width), (257, height), (258, depth), (259, 1), (262, photometric), (273, 8), (277, channels)]
    tags += [(278, height), (279, len(data))]
    start = 8 + len(data) + len(data) % 2
    many = start + 2 + 12 * len(tags) + 4  # the depths of three channels do not fit into their entry
    entries = b"".join(
        struct.pack("<HHII", tag, 3, 3, many)
        if tag == 258 and channels == 3
        else struct.pack("<HHIHxx", tag, 3, 1, value)
        for tag, value in tags
    )
    depths = struct.pack("<3H", *[depth] * 3)
    path.write_bytes(
        b"II*\0" + struct.pack("<I", start) + data.ljust(start - 8, b"\0") + struct.pack("<H", len(tags)) + entries
        + struct.pack("<I", 0) + depths
    )  # fmt: skip


@pytest.mark.parametrize(("colour", "depth"), PNG_KINDS)
def test_png_frames_and_masks_of_every_kind(tmp_path, colour, depth):
    rng = np.random.default_rng(depth)
    path, top = tmp_path / "x.png", 2**depth - 1
    samples = rng.integers(0, top + 1, (5, 11, CHANNELS[colour]))
    samples[0, 0], samples[0, 1] = 0, top
    palette = rng.integers(0, 256, (top + 1, 3), dtype=np.uint8) if colour == PALETTE else None
    write_png(path, samples, depth, colour, palette)

    if depth == 16:
        # A camera's 12 bits would be nearly black if 65535 were taken for white, and cutting bytes off makes 300 a 1.
        with pytest.raises(ValueError, match=r"image .*x\.png has mode .*; convert it to 8 bits per channel"):
            read_image(path)
        expected = None
    # The standard: intensity is sample / top, so 8 bits of it are the nearest to 255 · sample / top.
    elif palette is not None:
        expected = palette[samples[..., 0]]
    else:
        colours = samples[..., :3] if colour in (RGB, RGBA) else samples[..., :1]
        expected = np.broadcast_to(np.floor(colours * 255.0 / top + 0.5), (5, 11, 3))
    if expected is not None:
        frame = read_image(path)
        assert frame.dtype == np.uint8
        assert frame.flags.writeable
        np.testing.assert_array_equal(frame, expected)

    if colour in (GREY, PALETTE):
        mask = read_label_raw(path)
        assert mask.dtype == (np.int32 if depth == 16 else np.uint8)
        np.testing.assert_array_equal(mask, samples[..., 0])
    else:
        with pytest.raises(ValueError, match=r"mask .*x\.png has mode \w+; expected one channel"):
            read_label_raw(path)


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_tiff_of_every_depth(tmp_path, depth, photometric):
    if (depth, photometric) == (16, 0):
        pytest.skip("Pillow reads no 16 bits with zero for white")
    path, top = tmp_path / "x.tif", 2**depth - 1
    samples = np.random.default_rng(0).integers(0, top + 1, (5, 16, 1))
    write_tiff(path, samples, depth, photometric)
    np.testing.assert_array_equal(read_label_raw(path), samples[..., 0])
    if depth == 16:
        with pytest.raises(ValueError, match=r"has mode I(;16)?; convert"):
            read_image(path)
        return
    shown = np.floor((samples if photometric else top - samples) * 255.0 / top + 0.5)
    np.testing.assert_array_equal(read_image(path), shown.repeat(3, -1))


def test_tiff_with_sixteen_bits_per_colour(tmp_path):
    samples = np.random.default_rng(0).integers(0, 65536, (5, 8, 3))
    write_tiff(tmp_path / "x.tiff", samples, 16, 2)
    with pytest.raises(ValueError, match=r"x\.tiff has mode RGB with 16 bits per channel; convert"):
        read_image(tmp_path / "x.tiff")


@pytest.mark.parametrize("kind", ["F", "I"])
def test_samples_of_32_bits_are_refused(tmp_path, kind):
    Image.new(kind, (4, 3), 9).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=rf"image .*x\.tif has mode {kind}; convert it to 8 bits"):
        read_image(tmp_path / "x.tif")


PIXELS = np.random.default_rng(1).integers(0, 256, (6, 9, 3), dtype=np.uint8)
# What the EXIF standard means by each value, as steps on the stored pixels.
ORIENTATIONS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x[::-1, ::-1].swapaxes(0, 1), 0),
    8: lambda x: np.rot90(x, 1),
}


def save(path, pixels, orientation=1, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, **({} if orientation == 1 else {"exif": exif}), **options)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_of_frames_and_masks(tmp_path, orientation):
    turn = ORIENTATIONS[orientation]
    for name, options in (("x.png", {}), ("x.tif", {}), ("x.webp", {"lossless": True})):
        save(tmp_path / name, PIXELS, orientation, **options)
        np.testing.assert_array_equal(read_image(tmp_path / name), turn(PIXELS))
        assert exif_orientation(tmp_path / name) == orientation
    save(tmp_path / "x.jpg", PIXELS, orientation)
    save(tmp_path / "plain.jpg", PIXELS)
    np.testing.assert_array_equal(read_image(tmp_path / "x.jpg"), turn(read_image(tmp_path / "plain.jpg")))
    save(tmp_path / "mask.png", PIXELS[..., 0], orientation)
    np.testing.assert_array_equal(read_label_raw(tmp_path / "mask.png"), turn(PIXELS[..., 0]))


@pytest.mark.parametrize("kind", ["BMP", "WEBP", "TIFF"])
def test_formats_go_by_content(tmp_path, kind):
    Image.fromarray(PIXELS).save(tmp_path / "x.jpg", kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(read_image(tmp_path / "x.jpg"), PIXELS)


@pytest.mark.parametrize(("masks", "bits"), [((0xF800, 0x7E0, 0x1F), (5, 6, 5)), ((0x7C00, 0x3E0, 0x1F), (5, 5, 5))])
def test_bmp_with_sixteen_bits_per_pixel(tmp_path, masks, bits):
    values = np.random.default_rng(0).integers(0, 32, (3, 4, 3))
    pixels = sum(values[..., i] * (mask & -mask) for i, mask in enumerate(masks)).astype("<u2")[::-1]
    header = struct.pack("<IiiHHIIiiII", 40, 4, 3, 1, 16, 3, 24, 0, 0, 0, 0) + struct.pack("<3I", *masks)
    path = tmp_path / "x.bmp"
    path.write_bytes(b"BM" + struct.pack("<IHHI", 90, 0, 0, 66) + header + pixels.tobytes())
    tops = 2 ** np.array(bits) - 1
    np.testing.assert_allclose(read_image(path), values * 255 / tops, atol=1)


@pytest.mark.parametrize("kind", ["PPM", "GIF", "TGA", "EPS", "ICO", "PDF", "SGI", "PCX"])
def test_other_parsers_are_not_reached(tmp_path, kind):
    Image.fromarray(PIXELS).save(tmp_path / "x.png", kind)
    for read, what in ((read_image, "image"), (read_label_raw, "mask")):
        with pytest.raises(ValueError, match=rf"{what} .*x\.png cannot be read, .* known format \(BMP, JPEG, PNG"):
            read(tmp_path / "x.png")


def test_too_many_pixels_are_a_named_error(tmp_path, monkeypatch):
    save(tmp_path / "x.png", PIXELS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    for read, what in ((read_image, "image"), (read_label_raw, "mask"), (exif_orientation, "image")):
        with pytest.raises(ValueError, match=rf"{what} .*x\.png is too large: .*54 pixels.*MAX_IMAGE_PIXELS"):
            read(tmp_path / "x.png")


def test_several_pictures_in_one_file(tmp_path):
    pages = [Image.fromarray(np.full((4, 6, 3), v, np.uint8)) for v in (0, 100, 255)]
    for name in ("x.tif", "x.webp", "x.png", "x.gif"):
        options = {"duration": [40, 120, 80], "lossless": True} if name != "x.tif" else {}
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:], **options)
        assert count_pictures(tmp_path / name) == 3
        found = list(animation(tmp_path / name))
        assert [int(image.mean()) for image, _ in found] == [0, 100, 255]
        assert [seconds for _, seconds in found] == ([0.04, 0.12, 0.08] if options else [0, 0, 0])
        if name != "x.gif":
            with pytest.raises(ValueError, match=r"image .* holds 3 pictures; expected one"):
                read_image(tmp_path / name)
    pages[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=pages[1:2])
    assert read_image(tmp_path / "phone.jpg").mean() == 0
    assert count_pictures(tmp_path / "phone.jpg") == 1


def test_a_size_that_exif_explains_says_so(tmp_path):
    save(tmp_path / "a.jpg", PIXELS, 6)
    save(tmp_path / "a.png", PIXELS[..., 0])
    image, mask = read_image(tmp_path / "a.jpg"), read_label_raw(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"must match\. EXIF orientation 6 turns or mirrors the image"):
        check_same_size(image, mask, tmp_path / "a.jpg", tmp_path / "a.png")
    save(tmp_path / "b.png", PIXELS[..., 0], 6)
    check_same_size(image, read_label_raw(tmp_path / "b.png"), tmp_path / "a.jpg", tmp_path / "b.png")


def test_check_names_exif_and_keeps_its_report(make_tree, tmp_path, monkeypatch):
    name = make_tree("picture_check", {"v": 4})
    folder = tmp_path / name / "data" / "v" / "origin"
    for stem, orientation in (("001", 3), ("002", 6)):
        save(folder / f"{stem}.png", np.array(Image.open(folder / f"{stem}.png")), orientation)
    Image.fromarray(np.zeros((70, 70, 3), np.uint8)).save(folder / "003.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    report = check_dataset(name)
    assert report.frames_checked == 4
    found = {(p.kind, p.file.rpartition("/")[2]): p.message for p in report.problems}
    assert set(found) >= {
        ("EXIF orientation", "001.png"),
        ("size mismatch", "002.png"),
        ("unreadable image", "003.png"),
    }
    assert "EXIF orientation 6" in found["size mismatch", "002.png"]
    assert "too large" in found["unreadable image", "003.png"]


def scan_kinds(name):
    return sorted((p.kind, p.file.rpartition("/")[2]) for p in registered_tree(name).scan().problems)


@pytest.mark.parametrize("suffix", ["tif", "TIFF", "webp", "bmp", "JPEG"])
def test_a_frame_of_another_format_is_a_frame(make_tree, tmp_path, suffix):
    name = make_tree("picture_suffix", {"v": 3})
    folder = tmp_path / name / "data" / "v" / "origin"
    Image.open(folder / "001.png").save(folder / f"001.{suffix}")
    (folder / "001.png").unlink()
    records = registered_tree(name).scan().records
    assert [frame["frame_id"] for frame in records[0]["frames"]] == ["000", "001", "002"]
    assert scan_kinds(name) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["origin/003.heic"], [("unread frame", "003.heic")]),
        (["origin/003.jp2"], [("unread frame", "003.jp2")]),
        (["origin/003"], [("unread frame", "003")]),
        (["origin/003.raw", "mask/001.tif"], [("unread frame", "003.raw")]),
        (["origin/001.PNG"], [("repeated frame", "001.png")]),
        (["mask/001.PNG"], [("repeated mask", "001.png")]),
        (["origin/001.json", "origin/notes.txt", "mask/colours.txt", "origin/Thumbs.db"], []),
    ],
)
def test_no_file_gets_lost_among_frames_and_masks(make_tree, tmp_path, files, expected):
    name = make_tree("picture_lost", {"v": 3}, require_labels=False)
    for file in files:
        (tmp_path / name / "data" / "v" / file).write_bytes(b"x")
    assert scan_kinds(name) == expected
    if expected:
        with pytest.raises(ValueError, match=rf"{expected[0][1]}: (is not read|same)"):
            get_records(name)


def test_a_mask_of_another_suffix_gets_not_lost_either(make_tree, tmp_path):
    name = make_tree("picture_mask", {"v": 3}, require_labels=False)
    folder = tmp_path / name / "data" / "v" / "mask"
    (folder / "001.png").rename(folder / "001.tif")
    assert scan_kinds(name) == [("unread mask", "001.tif")]


def test_image_folders_lose_nothing_either(tmp_path):
    for stem in ("1", "2"):
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(PIXELS[..., 0] % 2).save(tmp_path / folder / f"{stem}.png")
    tree = register_image_tree("picture_images", tmp_path / "images", tmp_path / "masks", ["a", "b"])
    assert tree.scan().problems == []
    (tmp_path / "images" / "3.heic").write_bytes(b"x")
    (tmp_path / "masks" / "2.png").rename(tmp_path / "masks" / "2.bmp")
    assert scan_kinds("picture_images") == [
        ("missing mask", "2.png"),
        ("unread frame", "3.heic"),
        ("unread mask", "2.bmp"),
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_pictures_of_every_format_are_named(tmp_path):
    """Single flipped bytes and cuts: a picture, or a ValueError; nothing else."""
    rng = np.random.default_rng(0)
    outcomes = Counter()
    for kind, options in (("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("TIFF", {"compression": "tiff_lzw"}), ("BMP", {})):
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(PIXELS).save(buffer, kind, **({} if kind == "BMP" else {"exif": exif}), **options)
        for number in range(60):
            data = bytearray(buffer.getvalue())
            if number % 3:
                for place in rng.integers(0, len(data), rng.integers(1, 4)):
                    data[place] = rng.integers(0, 256)
            else:
                data = data[: rng.integers(0, len(data))]
            path = tmp_path / "x.png"
            path.write_bytes(data)
            for read in (read_image, read_label_raw):
                message = ""
                try:
                    read(path)
                except ValueError as error:
                    message = str(error)
                assert not message or str(path) in message
                outcomes[kind, bool(message)] += 1
    # Of every format some are read and some refused.
    assert len(outcomes) == 10


def test_there_is_one_reader():
    """Whoever opens pictures or videos by himself does without formats, limits, orientation, tracks and colours."""
    readers = {"data/io.py", "inference/live/video_file.py", "inference/live/sources.py"}
    writers = {"inference/rendering/video_writer.py", "inference/rendering/sound.py"}
    opens = re.compile(r"Image\.open\(|\bav\.open\(|cv2\.(imread|imdecode|VideoCapture)\(|PIL\.open|ToPILImage|imageio")
    root = Path(the_mask.__file__).parent
    files = [file for file in root.rglob("*.py") if "runtime" not in file.relative_to(root).parts]
    files += [file for folder in ("tools", "datasets", "benchmarks") for file in root.parent.glob(f"{folder}/*.py")]
    found = {file for file in files if opens.search(file.read_text())}
    assert found == {root / name for name in readers | writers}
