"""Image files of every kind."""

import io
import os
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import jpeg
from PIL import Image

from skinsynth.data import isic
from skinsynth.data.images import BadImage, Images, mislabelled, read_image
from skinsynth.errors import UserError


def test_images_of_any_kind_become_rgb(tmp_path: Path) -> None:
    for i, mode in enumerate(("L", "CMYK", "RGB")):
        assert read_image(jpeg(tmp_path / f"{i}.jpg", mode)).shape == (30, 40, 3)
    for mode in ("RGBA", "P", "LA", "1"):
        image = read_image(jpeg(tmp_path / f"{mode}.png", mode))
        assert image.shape == (30, 40, 3)
        assert image.dtype == np.uint8


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), (200, 0, 0))
    image.paste((0, 0, 200), (0, 0, 20, 20))  # blue on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes top
    image.save(tmp_path / "turned.jpg", exif=exif)
    upright = read_image(tmp_path / "turned.jpg")
    assert upright.shape == (40, 20, 3)
    assert upright[2, 10, 2] > 150
    assert upright[-3, 10, 0] > 150


def bomb() -> bytes:
    """A PNG header that claims 40,000 x 40,000 pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = (40_000).to_bytes(4, "big")
    header = chunk(b"IHDR", side + side + b"\x08\x02\x00\x00\x00")
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def test_unusable_images_say_why(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "JPEG")
    for name, data, reason in (("empty", b"", "empty file"), ("cut", buffer.getvalue()[:-600], "truncated"), ("text", b"<html>", "not an image"),
                               ("bomb", bomb(), "decompression bomb")):
        (tmp_path / f"{name}.jpg").write_bytes(data)
        with pytest.raises(BadImage, match=reason):
            read_image(tmp_path / f"{name}.jpg")
    with pytest.raises(BadImage, match="only 4 x 4 pixels"):
        read_image(jpeg(tmp_path / "tiny.jpg", size=(4, 4)))
    with pytest.raises(BadImage, match="missing"):
        Images(tmp_path).find("absent")
    with pytest.raises(BadImage, match="missing"):
        read_image(tmp_path / "absent.jpg")


def test_a_png_named_jpg_is_read_and_noted(tmp_path: Path) -> None:
    path = jpeg(tmp_path / "a.jpg", format="PNG")
    assert read_image(path).shape == (30, 40, 3)
    assert mislabelled(path) == "a.jpg is a PNG file"
    assert mislabelled(jpeg(tmp_path / "b.jpg")) is None
    assert mislabelled(jpeg(tmp_path / "c.png")) is None


def test_an_image_is_found_whatever_its_ending_and_in_folders_within(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.Jpg", "c.tif", "part_1/d.jpeg", "e.png", "deep/e.jpg", "part_1/f.jpg", "part_2/f.jpg", "part_1/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith("txt"):
            (tmp_path / name).write_text("no image")
        else:
            Image.new("RGB", (40, 30), (200, 150, 120)).save(tmp_path / name)
    images = Images(tmp_path)
    assert {name: str(images.find(name).relative_to(tmp_path)) for name in "abcde"} == {
        "a": "a.jpg", "b": "b.Jpg", "c": "c.tif", "d": "part_1/d.jpeg", "e": "e.png"}
    assert read_image(images.find("c")).shape == (30, 40, 3)
    assert mislabelled(images.find("c")) is None
    with pytest.raises(BadImage, match=r"2 files have its name: part_1/f\.jpg, part_2/f\.jpg"):
        images.find("f")
    for name in ("notes", "g"):
        with pytest.raises(BadImage, match="missing"):
            images.find(name)
    rows, _ = isic.read_dreambooth(tmp_path, tmp_path / "part_1")
    assert {Path(row.file or "").name for row in rows} == {"a.jpg", "b.Jpg", "c.tif", "e.png", "d.jpeg", "f.jpg"}


def test_folders_behind_links_are_looked_through_once(tmp_path: Path) -> None:
    (tmp_path / "disk/deep").mkdir(parents=True)
    (tmp_path / "images").mkdir()
    jpeg(tmp_path / "disk/deep/a.png")
    (tmp_path / "images/part_1").symlink_to(tmp_path / "disk")
    (tmp_path / "images/part_2").symlink_to(tmp_path / "disk/deep")  # the same again
    (tmp_path / "disk/deep/loop").symlink_to(tmp_path / "disk")
    assert str(Images(tmp_path / "images").find("a").relative_to(tmp_path / "images")) == "part_1/deep/a.png"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_images_in_a_folder_that_cannot_be_read_are_not_missing() -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "locked").mkdir(mode=0o700)
        jpeg(Path(name) / "locked/a.png")
        Path(name).chmod(0o755)
        os.seteuid(65534)
        try:
            with pytest.raises(UserError, match=r"the folder .*/locked cannot be read \(Permission denied\), nor images in it"):
                Images(Path(name)).find("a")
        finally:
            os.seteuid(0)
