"""Laws of one picture as a training example: every kind of file, alpha, depth, orientation, and the square that is cut."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import read_picture, square
from PIL import Image


@pytest.mark.parametrize(
    "mode, ending",
    [
        ("1", "png"),
        ("L", "png"),
        ("P", "png"),
        ("RGB", "png"),
        ("RGBA", "png"),
        ("LA", "png"),
        ("I;16", "png"),
        ("CMYK", "tif"),
        ("YCbCr", "tif"),
        ("LAB", "tif"),
        ("I", "tif"),
        ("F", "tif"),
        ("I;16", "tif"),
        ("CMYK", "jpg"),
        ("L", "jpg"),
        ("RGB", "webp"),
        ("P", "gif"),
        ("RGB", "bmp"),
        ("1", "tif"),
    ],
)
def test_every_mode_is_the_same_picture(tmp_path, mode, ending) -> None:
    """Left half white, right half black, in whatever way a file says it."""
    image = Image.new("RGB", (16, 12), "black")
    image.paste("white", (0, 0, 8, 12))
    if mode == "I;16":
        image = Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16) * 257))
    elif mode == "LAB":
        from PIL import ImageCms

        image = ImageCms.profileToProfile(
            image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    elif mode == "I":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.int32) * 257)
    else:
        image = image.convert(mode)
    assert image.mode == mode
    image.save(tmp_path / f"x.{ending}")
    read = read_picture(tmp_path / f"x.{ending}")
    assert read.mode == "RGB" and read.size == (16, 12)
    seen = np.asarray(read).astype(int)
    assert seen[:, :6].min() > 235 and seen[:, 10:].max() < 20


def test_alpha_is_laid_over_white(tmp_path) -> None:
    for mode, colour in (("RGBA", (200, 0, 0, 0)), ("LA", (0, 0))):
        Image.new(mode, (4, 4), colour).save(tmp_path / "x.png")
        assert read_picture(tmp_path / "x.png").getpixel((1, 1)) == (255, 255, 255)
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png").getpixel((1, 1)) == pytest.approx(
        (255, 127, 127), abs=1
    )
    palette = Image.new("RGB", (4, 4), (0, 0, 255)).quantize(4)
    palette.save(tmp_path / "x.png", transparency=palette.getpixel((0, 0)))
    assert read_picture(tmp_path / "x.png").getpixel((1, 1)) == (255, 255, 255)
    Image.new("RGB", (4, 4), (0, 0, 255)).save(tmp_path / "x.png", transparency=(0, 0, 255))
    assert read_picture(tmp_path / "x.png").getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.full((4, 4), 200, np.uint16), 1),
        (np.full((4, 4), 32768, np.uint16), 128),
        (np.full((4, 4), 0.5, np.float32), 128),
        (np.full((4, 4), 128.0, np.float32), 128),
        (np.full((4, 4), 128, np.int32), 128),
        (np.full((4, 4), 32768, np.int32), 128),
        (np.full((4, 4), np.nan, np.float32), 0),
        (np.full((4, 4), -5.0, np.float32), 0),
    ],
)
def test_how_bright_a_wide_picture_is(tmp_path, values, expected) -> None:
    """Sixteen bits are sixteen bits however dark the picture; floats up to 1 are shares of white."""
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert read_picture(tmp_path / "x.tif").getpixel((1, 1)) == (expected,) * 3


def test_a_picture_is_turned_as_its_camera_says(tmp_path) -> None:
    image, exif = Image.new("RGB", (20, 10), "black"), Image.Exif()
    image.paste("white", (0, 0, 10, 10))
    exif[0x0112] = 6  # a quarter turn clockwise to view it
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    read = read_picture(tmp_path / "x.jpg")
    assert (
        read.size == (10, 20)
        and min(read.getpixel((5, 2))) > 240
        and max(read.getpixel((5, 17))) < 15
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 2), (640, 20), (100, 300)])
def test_a_square_is_cut_from_the_centre(size) -> None:
    image = Image.new("RGB", size, (9, 99, 199))
    assert square(image, 16).shape == (16, 16, 3) and (square(image, 16) == (9, 99, 199)).all()
    wide = Image.new("RGB", (60, 20), "black")
    wide.paste("white", (20, 0, 40, 20))
    assert square(wide, 16).min() > 200 and square(wide.rotate(90, expand=True), 16).min() > 200
