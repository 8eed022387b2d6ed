"""Reading images and masks, and what the errors say."""

import numpy as np
import pytest
from PIL import Image

from the_mask.data.io import (
    apply_label_table,
    check_same_size,
    read_image,
    read_label,
    read_label_raw,
    read_size,
    write_picture,
)

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
TABLE = [255, 0, 1, -1, 2]


def test_rgb_and_grey_and_alpha(tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == IMAGE).all()
    Image.fromarray(IMAGE[..., 0]).save(tmp_path / "b.png")
    assert (read_image(tmp_path / "b.png") == IMAGE[..., :1]).all()
    Image.fromarray(np.concatenate([IMAGE, IMAGE[..., :1]], -1)).save(tmp_path / "c.png")
    assert (read_image(tmp_path / "c.png") == IMAGE).all()
    assert read_image(tmp_path / "c.png").flags.writeable


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(IMAGE).save(tmp_path / "a.png", exif=exif)
    assert (read_image(tmp_path / "a.png") == np.rot90(IMAGE, -1)).all()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_files_are_named(tmp_path, suffix):
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"image .*cut\.{suffix} cannot be read, it is truncated"):
        read_image(path)


def test_broken_files_are_named(tmp_path):
    for content in (b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"mask .*x\.png cannot be read"):
            read_label_raw(tmp_path / "x.png")
    with pytest.raises(FileNotFoundError, match=r"image .*none\.jpg does not exist"):
        read_image(tmp_path / "none.jpg")


def test_a_png_with_a_damaged_pixel_chunk_is_named(tmp_path):
    path = tmp_path / "bad.png"
    Image.fromarray(RNG.integers(0, 9, (64, 64), dtype=np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"bad\.png cannot be read"):
        read_label_raw(path)


def test_labels_of_all_kinds(tmp_path):
    raw = np.array([[0, 1], [2, 4]], np.uint8)
    expected = [[255, 0], [1, 2]]
    Image.fromarray(raw).save(tmp_path / "grey.png")
    palette = Image.new("P", (2, 2))
    palette.putdata(raw.ravel().tolist())
    palette.putpalette(list(range(256)) * 3)
    palette.save(tmp_path / "palette.png")
    Image.fromarray(raw.astype(np.uint16)).save(tmp_path / "wide.png")
    for name in ("grey", "palette", "wide"):
        label = read_label(tmp_path / f"{name}.png", TABLE)
        assert label.tolist() == expected
        assert label.dtype == np.uint8


def test_sixteen_bit_ids(tmp_path):
    table = [65535, *range(400)]
    raw = np.array([[0, 1, 300], [400, 256, 2]], np.uint16)
    Image.fromarray(raw).save(tmp_path / "wide.png")
    label = read_label(tmp_path / "wide.png", table)
    assert label.dtype == np.int32
    assert label.tolist() == [[65535, 0, 299], [399, 255, 1]]


def test_illegal_ids_are_named(tmp_path):
    path = tmp_path / "m.png"
    Image.fromarray(np.array([[0, 3], [200, 4]], np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"mask .*m\.png holds label values \[3, 200\]; allowed: 0\.\.2, 4$"):
        read_label(path, TABLE)
    with pytest.raises(ValueError, match=r"holds label values \[-2, 70000\]"):
        apply_label_table(np.array([[-2, 70000, 1]], np.int32), TABLE, path)


def test_colour_masks_and_deep_images_are_refused(tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match=r"rgb\.png has mode RGB; expected one channel"):
        read_label_raw(tmp_path / "rgb.png")
    Image.fromarray(IMAGE[..., 0].astype(np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png has mode I(;16)?; convert"):
        read_image(tmp_path / "deep.png")


def test_size_mismatch_names_both_files():
    check_same_size(IMAGE, IMAGE[..., 0], "a.jpg", "a.png")
    with pytest.raises(ValueError, match=r"image a\.jpg is 13x17 .* mask a\.png is 17x13"):
        check_same_size(IMAGE, IMAGE[..., 0].T, "a.jpg", "a.png")


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_pictures_are_written_whole(tmp_path, kind, monkeypatch):
    labels = RNG.integers(0, np.iinfo(kind).max, (13, 17)).astype(kind)
    path = tmp_path / "new" / "m.png"
    write_picture(path, labels)
    assert (read_label_raw(path) == labels).all()
    write_picture(tmp_path / "i.JPG", IMAGE, quality=95)
    assert Image.open(tmp_path / "i.JPG").format == "JPEG"
    with pytest.raises(ValueError, match=r"picture .*x\.txt: unknown suffix '\.txt'"):
        write_picture(tmp_path / "x.txt", IMAGE)

    def full(picture, stream, **options):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*m\.png'"):
        write_picture(path, labels * 0)
    monkeypatch.undo()
    assert (read_label_raw(path) == labels).all()
    assert [file.name for file in path.parent.iterdir()] == ["m.png"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_upright_picture(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(IMAGE).save(tmp_path / "a.jpg", exif=exif)
    assert read_size(tmp_path / "a.jpg") == read_image(tmp_path / "a.jpg").shape[:2]
