"""Decoding: every kind of image becomes RGB uint8 of the annotated size, or an error."""

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from yolo.data.dataset import (
    MAX_PIXELS,
    RawAnnotation,
    assemble,
    check_pixels,
    find_image,
    header_size,
    read_rgb,
)
from yolo.data.images import letterboxed
from yolo.errors import UserError

ORIENTATION = 0x0112


@pytest.fixture
def picture() -> Image.Image:
    """64 wide, 48 high: red on the left, blue on the right."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32, 0] = 200
    pixels[:, 32:, 2] = 200
    return Image.fromarray(pixels)


def save(picture: Image.Image, path: Path, orientation: int | None = None) -> Path:
    exif = Image.Exif()
    if orientation:
        exif[ORIENTATION] = orientation
    picture.save(path, exif=exif) if orientation else picture.save(path)
    return path


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", ".jpg"),
        ("L", ".jpg"),
        ("CMYK", ".jpg"),
        ("P", ".png"),
        ("RGBA", ".png"),
        ("RGB", ".bmp"),
    ],
)
def test_every_mode_becomes_rgb(picture: Image.Image, tmp_path: Path, mode: str, suffix: str):
    image = read_rgb(save(picture.convert(mode), tmp_path / f"x{suffix}"), (48, 64))
    assert image.shape == (48, 64, 3) and image.dtype == np.uint8
    expected = (
        np.array(picture.convert(mode).convert("RGB")) if mode != "CMYK" else np.array(picture)
    )
    assert np.abs(image[20, 8].astype(int) - expected[20, 8]).max() < 12
    assert np.abs(image[20, 56].astype(int) - expected[20, 56]).max() < 12


def test_sixteen_bits_become_eight(tmp_path: Path):
    cv2.imwrite(str(tmp_path / "x.png"), np.full((4, 5), 200 * 256, np.uint16))
    assert (read_rgb(tmp_path / "x.png", (4, 5)) == 200).all()


def test_reduced_decoding_keeps_colours_and_the_longest_side(picture: Image.Image, tmp_path: Path):
    path = save(picture.resize((640, 480)), tmp_path / "x.jpg")
    for min_side, shape in (
        (640, (480, 640)),
        (321, (480, 640)),
        (320, (240, 320)),
        (80, (60, 80)),
        (1, (60, 80)),
    ):
        image = read_rgb(path, (480, 640), min_side)
        assert image.shape[:2] == shape
        assert image[shape[0] // 2, 4, 0] > 180 and image[shape[0] // 2, -4, 2] > 180


def test_odd_sizes_survive_reduced_decoding(picture: Image.Image, tmp_path: Path):
    path = save(picture.resize((333, 251)), tmp_path / "x.jpg")
    assert read_rgb(path, (251, 333), 50).shape == (63, 84, 3)


def test_a_file_is_what_it_holds_whatever_its_name_says(picture: Image.Image, tmp_path: Path):
    path = save(picture.resize((333, 251)), tmp_path / "x.png").rename(tmp_path / "x.jpg")
    assert read_rgb(path, (251, 333), 50).shape == (251, 333, 3)


def test_a_damaged_exif_tag_is_none(picture: Image.Image, tmp_path: Path):
    path = tmp_path / "x.jpg"
    picture.save(path, dpi=(72, 72))
    content, tag = path.read_bytes(), b"Exif\0\0no TIFF header"
    path.write_bytes(
        content[:20] + b"\xff\xe1" + struct.pack(">H", len(tag) + 2) + tag + content[20:]
    )
    with Image.open(path) as image, pytest.raises(SyntaxError):
        image.getexif()
    assert header_size(path, follow_exif=True) == (48, 64)
    assert read_rgb(path, (48, 64)).shape == (48, 64, 3)


def test_boxes_of_the_stored_pixels_get_the_stored_pixels(picture: Image.Image, tmp_path: Path):
    """As VOC: the annotation says 64x48, so the EXIF tag is ignored."""
    image = read_rgb(save(picture, tmp_path / "x.jpg", orientation=6), (48, 64), follow_exif=False)
    assert image.shape[:2] == (48, 64) and image[24, 4, 0] > 180


@pytest.mark.parametrize("follow_exif", [False, True])
def test_boxes_of_the_turned_image_get_it_turned(
    picture: Image.Image, tmp_path: Path, follow_exif: bool
):
    """The annotation says 48x64: the tool has turned the image as its tag 6 says, clockwise."""
    image = read_rgb(
        save(picture, tmp_path / "x.jpg", orientation=6), (64, 48), follow_exif=follow_exif
    )
    assert image.shape[:2] == (64, 48)
    assert image[4, 24, 0] > 180 and image[-4, 24, 2] > 180  # left has become top


def test_half_a_turn_is_followed_where_the_source_says_so(picture: Image.Image, tmp_path: Path):
    path = save(picture, tmp_path / "x.jpg", orientation=3)
    assert read_rgb(path, (48, 64), follow_exif=False)[24, 4, 0] > 180
    assert read_rgb(path, (48, 64), follow_exif=True)[24, 4, 2] > 180
    assert header_size(save(picture, tmp_path / "y.jpg", orientation=8), follow_exif=True) == (
        64,
        48,
    )


def test_a_size_that_disagrees_is_an_error_with_both_sizes(picture: Image.Image, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"x\.jpg: the image is 64x48, but its annotation says 63x48"
    ):
        read_rgb(save(picture, tmp_path / "x.jpg"), (48, 63))


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_missing_empty_and_truncated_files_are_named(
    picture: Image.Image, tmp_path: Path, suffix: str
):
    path = tmp_path / f"x{suffix}"
    with pytest.raises(UserError, match=r"x\..*No such file"):
        read_rgb(path, (48, 64))
    save(picture, path)
    whole = path.read_bytes()
    for content in (b"", whole[:10], whole[: len(whole) // 2]):
        path.write_bytes(content)
        for min_side in (None, 8):
            with pytest.raises(UserError, match=r"x\.(jpg|png): is truncated"):
                read_rgb(path, (48, 64), min_side)


def test_one_pixel_is_an_image(tmp_path: Path):
    cv2.imwrite(str(tmp_path / "x.png"), np.full((1, 1, 3), 77, np.uint8))
    assert read_rgb(tmp_path / "x.png", (1, 1), 416).shape == (1, 1, 3)


def test_an_image_of_a_hundred_million_pixels_is_refused_by_its_header(tmp_path: Path):
    path = tmp_path / "huge.png"
    Image.new("1", (10000, 10000)).save(path)
    raw = RawAnnotation("huge", path, path, 10000, 10000, [])
    with pytest.raises(UserError, match=r"huge\.png: 10000x10000 is over 64 million pixels; scale"):
        assemble("test", ["huge"], lambda _: raw, ("cat",), skip_bad=False)
    with pytest.raises(UserError, match=r"huge\.png: 10000x10000 is over 64 million pixels; scale"):
        letterboxed(path, 64)
    with pytest.raises(UserError, match=r"huge\.png: 10000x10000 is over 64 million pixels; scale"):
        check_pixels(path, path.read_bytes())
    assert MAX_PIXELS < 10**8


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_twelve_bits_in_a_file_for_sixteen_are_no_night(tmp_path: Path, suffix: str):
    pixels = np.linspace(0, 4095, 64 * 48 * 3).reshape(48, 64, 3).astype(np.uint16)
    for name, values in (("twelve", pixels), ("sixteen", pixels * 16)):
        cv2.imwrite(str(tmp_path / f"{name}.{suffix}"), values)
    twelve, sixteen = (read_rgb(tmp_path / f"{name}.{suffix}") for name in ("twelve", "sixteen"))
    assert twelve.max() == 255
    np.testing.assert_allclose(twelve.astype(int), sixteen, atol=1)  # TIFF is rounded, PNG cut off


def test_pictures_that_are_turned_or_hold_twelve_bits_are_counted(
    picture: Image.Image, tmp_path: Path
):
    save(picture, tmp_path / "a.jpg", orientation=3)
    save(picture, tmp_path / "b.jpg", orientation=6)
    cv2.imwrite(str(tmp_path / "c.png"), np.full((48, 64), 4000, np.uint16))
    sizes = {"a.jpg": (48, 64), "b.jpg": (64, 48), "c.png": (48, 64)}

    def notices(follow_exif: bool) -> list[str]:
        def raw(name: str) -> RawAnnotation:
            return RawAnnotation(name, tmp_path / name, tmp_path / name, *sizes[name], [])

        return assemble("test", list(sizes), raw, ("cat",), False, follow_exif).notices

    turned, bits = notices(follow_exif=True)
    assert turned == f"2 pictures are turned as their EXIF tag says; the first: {tmp_path}/a.jpg"
    assert (
        bits
        == f"1 pictures hold 12 bits in a file for 16 and are read so; the first: {tmp_path}/c.png"
    )
    stored, turned, _ = notices(follow_exif=False)
    assert stored.startswith("1 pictures have an EXIF tag that turns them, but are read as stored")
    assert turned == f"1 pictures are turned as their EXIF tag says; the first: {tmp_path}/b.jpg"


def test_images_are_found_by_any_usual_suffix(tmp_path: Path):
    (tmp_path / "a.PNG").touch()
    assert find_image(tmp_path, "a").name == "a.PNG"
    assert find_image(tmp_path, "b").name == "b.jpg"
