"""Pictures that people have, good and bad, and what the program makes of them."""

from __future__ import annotations

import io
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wdmoe.broadcast.codec.contact_sheet import SheetRow, draw_sheet
from wdmoe.broadcast.codec.image_file import read_picture
from wdmoe.broadcast.codec.png import png_bytes
from wdmoe.broadcast.quality.large_pictures import picture_psnr_db, picture_ssim
from wdmoe.broadcast.quality.metrics import psnr_db, ssim
from wdmoe.errors import ConfigError

RED = (200, 30, 40)


def a_picture(height: int = 12, width: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (33, 70)])
@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm"])
def test_lossless_files_come_as_they_are(tmp_path: Path, size: tuple[int, int], suffix: str) -> None:
    picture, file = a_picture(*size), tmp_path / f"a.{suffix}"
    Image.fromarray(picture).save(file)
    assert np.array_equal(read_picture(file)[0], picture)
    assert read_picture(file)[1] == ()


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (64, 64)])
def test_our_own_png_files_are_read_by_others(tmp_path: Path, size: tuple[int, int]) -> None:
    picture = a_picture(*size)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(picture)))), picture)


def saved(file: Path, image: Image.Image, **how: object) -> np.ndarray:
    image.save(file, **how)
    return read_picture(file)[0]


def test_modes(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    grey = np.arange(240, dtype=np.uint8).reshape(12, 20)
    threefold = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(saved(file, Image.fromarray(grey)), threefold)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(saved(file, deep), threefold)
    assert np.array_equal(saved(tmp_path / "a.tiff", deep), threefold)
    assert np.array_equal(saved(file, Image.fromarray(grey > 100)), np.where(threefold > 100, 255, 0))
    assert np.array_equal(saved(tmp_path / "f.tiff", Image.fromarray(grey.astype(np.float32))), threefold)
    flat = Image.new("RGB", (9, 5), RED)
    assert (saved(file, flat.convert("P", palette=Image.Palette.ADAPTIVE)) == RED).all()
    ink = saved(tmp_path / "a.tiff", flat.convert("CMYK"))
    assert np.abs(ink.astype(int) - RED).max() <= 2
    assert np.abs(saved(tmp_path / "b.jpg", flat.convert("CMYK"), quality=100).astype(int) - RED).max() <= 6


def test_what_is_transparent_lies_on_white_and_is_said(tmp_path: Path) -> None:
    for mode in ("RGBA", "LA"):
        image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
        image.putpixel((1, 0), (0, 0, 0, 0))
        image.convert(mode).save(tmp_path / "a.png")
        picture, notes = read_picture(tmp_path / "a.png")
        assert picture.tolist() == [[[0, 0, 0], [255, 255, 255]]]
        assert notes == (f"{tmp_path / 'a.png'} is partly transparent: it is laid on white",)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert saved(tmp_path / "p.png", palette, transparency=1).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_of_an_animation_the_first_frame_is_taken_and_it_is_said(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in (RED, (0, 0, 0), (9, 9, 250))]
    for suffix in ("gif", "webp", "png"):
        file = tmp_path / f"a.{suffix}"
        how = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(file, save_all=True, append_images=frames[1:], **how)
        picture, notes = read_picture(file)
        assert (picture == RED).all()
        assert notes == (f"{file} is animated: only the first of its 3 frames is sent",)


def test_an_orientation_is_followed(tmp_path: Path) -> None:
    picture, exif = a_picture(4, 6), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    got = saved(tmp_path / "a.png", Image.fromarray(picture), exif=exif)
    assert np.array_equal(got, np.rot90(picture, -1))


def test_the_largest_pictures(tmp_path: Path) -> None:
    for size in ((4000, 3000), (3000, 4000)):
        Image.new("RGB", size, RED).save(tmp_path / "a.png")
        assert read_picture(tmp_path / "a.png")[0].shape == (size[1], size[0], 3)


@pytest.mark.parametrize("size", [(4001, 3000), (3001, 3001), (4000, 3001), (60_000, 60_000), (20_000, 20_000)])
def test_larger_ones_are_refused_before_they_are_unpacked(tmp_path: Path, size: tuple[int, int]) -> None:
    file = tmp_path / "a.png"
    head = png_bytes(a_picture(1, 1))
    width, height = (side.to_bytes(4, "big") for side in size)
    whole = head[:16] + width + height + head[24:]
    file.write_bytes(whole[:29] + zlib.crc32(whole[12:29]).to_bytes(4, "big") + whole[33:])
    with pytest.raises(ConfigError, match="at most 4000x3000"):
        read_picture(file)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a picture"),
        (b"hello, I am no picture\n" * 50, "not a picture"),
        (b"\x89PNG\r\n\x1a\n", "not a picture|damaged"),
        (png_bytes(a_picture(100, 100))[:9000], "damaged"),
        (png_bytes(a_picture(100, 100))[:50], "damaged"),
        (b"GIF89a\x05\x00\x05\x00", "not a picture"),
    ],
)
def test_what_is_no_picture(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_picture(file)
    assert str(file) in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_picture(tmp_path)


def test_random_bytes_behind_every_start(tmp_path: Path, rng: np.random.Generator) -> None:
    """Damaged anywhere: a picture of the right shape, or one line."""
    file = tmp_path / "a"
    for form in ("png", "jpeg", "gif", "tiff", "webp", "bmp", "ppm"):
        buffer = io.BytesIO()
        Image.fromarray(a_picture(20, 30)).save(buffer, form)
        for _ in range(40):
            data = bytearray(buffer.getvalue())
            for _ in range(3):
                data[int(rng.integers(len(data)))] = int(rng.integers(256))
            file.write_bytes(data[: int(rng.integers(1, len(data) + 1))])
            with suppress(ConfigError):
                picture, _ = read_picture(file)
                assert picture.dtype == np.uint8
                assert picture.ndim == 3


@pytest.mark.parametrize("size", [(11, 11), (300, 40), (700, 30)])
def test_quality_by_strips_is_that_of_the_whole(size: tuple[int, int], rng: np.random.Generator) -> None:
    wanted = a_picture(*size)
    got = np.clip(wanted + rng.normal(0, 20, wanted.shape), 0, 255).astype(np.uint8)
    assert picture_psnr_db(wanted, got) == pytest.approx(float(psnr_db(wanted, got)), abs=1e-6)
    assert picture_ssim(wanted, got) == pytest.approx(float(ssim(wanted[None], got[None])[0]), abs=1e-5)
    assert picture_psnr_db(wanted, wanted) == 100
    assert picture_ssim(wanted[:10], got[:10]) is None


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (500, 600)])
def test_a_sheet_of_any_size(size: tuple[int, int]) -> None:
    picture = a_picture(*size)
    sheet = draw_sheet("both", [SheetRow("one", "10 dB", picture, picture), SheetRow("two", "lost", picture, None)])
    assert sheet.width == 3 * 384 + 4 * 16
    assert sheet.height < 1200
