"""Image files of all modes and formats become RGB images; damaged files are recognized."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tf_lightning.data import ImageFiles, images
from tf_lightning.data.documents import BadSample, Skipped
from tf_lightning.data.images import load_image, to_rgb


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_an_rgb_image_of_the_right_size_is_unchanged():
    image = noise(32, 32)
    assert np.array_equal(load_image(saved(image), 32), image)


def test_a_path_loads_like_its_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(noise(40, 32)))
    from_path = load_image(tmp_path / "a.png", 32)
    assert np.array_equal(from_path, load_image((tmp_path / "a.png").read_bytes(), 32))


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (8, 8), 90), "PNG", (90, 90, 90)),
        (Image.new("1", (8, 8), 1), "PNG", (255, 255, 255)),
        (Image.new("LA", (8, 8), (90, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 255)), "WEBP", (255, 0, 0)),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 128)), "PNG", (127, 127, 127)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.new("RGB", (8, 8), (0, 0, 255)).convert("P"), "PNG", (0, 0, 255)),
        (Image.fromarray(np.full((8, 8), 0x8000, np.uint16)), "PNG", (128, 128, 128)),
    ],
    ids=["L", "1", "LA", "clear", "opaque", "half clear", "CMYK", "P", "16-bit"],
)
def test_every_mode_becomes_rgb(image, kind, expected):
    options = {"lossless": True} if kind == "WEBP" else {}
    loaded = load_image(saved(image, kind, **options), 8)
    assert loaded.mode == "RGB"
    assert np.asarray(loaded).reshape(-1, 3) == pytest.approx(np.array([expected] * 64), abs=1)


def test_cmyk_jpeg_becomes_rgb():
    red = Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
    loaded = np.asarray(load_image(saved(red, "JPEG", quality=95), 16))
    assert loaded.shape == (16, 16, 3)
    assert np.abs(loaded.astype(int) - (255, 0, 0)).max() < 12


def test_palette_transparency_becomes_white():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0] * 256)
    file = saved(image, "PNG", transparency=0)
    assert np.asarray(load_image(file, 8)).min() == 255


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_becomes_its_first_frame(kind):
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    file = saved(red, kind, save_all=True, append_images=[blue])
    assert Image.open(io.BytesIO(file)).n_frames == 2
    assert np.asarray(load_image(file, 8)).reshape(-1, 3)[0].tolist() == pytest.approx(
        [255, 0, 0], abs=4
    )


def test_a_wide_image_is_center_cropped():
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, :10], stripes[:, 10:20], stripes[:, 20:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    loaded = np.asarray(load_image(saved(Image.fromarray(stripes)), 10))
    assert (loaded == (0, 255, 0)).all()


@pytest.mark.parametrize("size", [(7, 300), (300, 7), (1, 1), (64, 64), (65, 64)])
def test_every_size_becomes_image_size(size):
    assert load_image(saved(noise(*size)), 32).size == (32, 32)


def test_the_exif_orientation_is_applied():
    image = Image.new("RGB", (8, 8), "white")
    image.paste("black", (0, 0, 8, 4))  # black upper half
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    loaded = np.asarray(load_image(saved(image, "PNG", exif=exif), 8))
    assert loaded[:4].min() == 255
    assert loaded[4:].max() == 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_image_is_a_bad_sample(kind, share):
    file = saved(noise(64, 64), kind)
    with pytest.raises(BadSample, match="(truncated|damaged|undecodable) image"):
        load_image(file[: int(len(file) * share)], 32)


def test_a_truncated_png_is_called_truncated():
    file = saved(noise(64, 64))
    with pytest.raises(BadSample, match="truncated image"):
        load_image(file[: len(file) // 2], 32)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "empty image file"),
        (b"abc", "undecodable image"),
        (b"<html>not found</html>", "image file that is HTML, not one of JPEG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "image file that is HEIC, not one of JPEG"),
        (saved(Image.new("RGB", (8, 8)), "ICO"), "image file that is ICO, not one of JPEG"),
        (saved(Image.new("LAB", (8, 8)), "TIFF"), "image of mode LAB"),
    ],
)
def test_a_file_that_is_not_an_image_is_a_bad_sample(file, reason):
    with pytest.raises(BadSample, match=reason):
        load_image(file, 32)


def test_a_missing_image_is_a_bad_sample(tmp_path):
    with pytest.raises(BadSample, match="missing image"):
        load_image(tmp_path / "none.png", 32)


def test_a_decompression_bomb_is_a_bad_sample(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for side in (40, 64):  # above the limit, above twice the limit
        with pytest.raises(BadSample, match="image of more than 1,000 pixels"):
            load_image(saved(noise(side, side)), 32)


def test_rgb_images_are_unchanged():
    image = noise(4, 4)
    assert np.array_equal(to_rgb(image), image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_show_the_same_image(orientation):
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    # The image as the sensor stores it for each value of "Orientation" (EXIF 2.32).
    seen = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: np.rot90(upright), 7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(Image.fromarray(np.ascontiguousarray(seen)), "JPEG", quality=95, exif=exif)
    found = np.asarray(load_image(file, 16)).astype(int)
    for place in ((3, 3), (3, 12), (12, 3), (12, 12)):
        assert np.abs(found[place] - upright[place]).max() < 30


def test_16_bit_rgb_becomes_8_bit():
    # Pillow cannot write 16-bit RGB, so the chunks IHDR, IDAT and IEND are written here.
    chunk = lambda name, data: (  # noqa: E731
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    )
    pixels = b"".join(b"\0" + struct.pack(">3H", 0xFFFF, 0x8000, 0) * 8 for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    loaded = np.asarray(load_image(b"\x89PNG\r\n\x1a\n" + chunks, 8))
    assert loaded.reshape(-1, 3).tolist() == [[255, 128, 0]] * 64


def test_the_resampler_is_bicubic_with_antialiasing():
    image = noise(60, 40)
    expected = image.resize((16, 16), Image.Resampling.BICUBIC, box=(10, 0, 50, 40))
    assert np.array_equal(load_image(saved(image), 16), expected)


def test_a_folder_or_named_pipe_is_a_missing_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "pipe.png"):
        with pytest.raises(BadSample, match="missing image"):
            load_image(path, 32)


def test_truncated_images_are_skipped(tmp_path):
    for number, share in enumerate((1.0, 0.5, 0.4)):
        file = saved(noise(64, 64))
        (tmp_path / f"{number}.png").write_bytes(file[: int(len(file) * share)])
    source = ImageFiles(str(tmp_path / "*.png"), val_fraction=0, image_size=32)
    found = list(source.documents("train"))
    assert found[1:] == [Skipped("truncated image")] * 2 and found[0][0].size == (32, 32)


# Values of white, and what may be opened

RAMP = np.tile(np.linspace(0, 1, 8), (8, 1))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 255).astype(np.float32), "TIFF"),
        ((RAMP * 1.2 - 0.005).clip(-0.005, 1).astype(np.float32), "TIFF"),
        *(((RAMP * white).astype(np.int32), "TIFF") for white in (255, 1023, 65_535, 2**31 - 1)),
        *(((RAMP * white).astype(np.uint16), kind) for white in (255, 65_535)
          for kind in ("TIFF", "PNG")),
    ],
)  # fmt: skip
def test_gray_of_16_and_32_bits_is_not_black(values, kind):
    loaded = np.asarray(load_image(saved(Image.fromarray(values), kind), 8)).astype(int)
    expected = (values.clip(0) / values.max() * 255)[..., None]
    assert np.abs(loaded - expected).max() <= 1


@pytest.mark.parametrize("maximum", [255, 1023, 65_535])
def test_gray_of_pgm_files(maximum):
    values = (RAMP * maximum).astype(">u2" if maximum > 255 else np.uint8)
    loaded = load_image(b"P5 8 8 %d\n" % maximum + values.tobytes(), 8)
    assert np.abs(np.asarray(loaded)[:, :, 0] - RAMP * 255).max() <= 1


@pytest.mark.parametrize("values", [RAMP - 0.5, RAMP * np.nan, RAMP * 1e30])
def test_values_of_unknown_range_are_named(values):
    with pytest.raises(BadSample, match="float image with values of unknown range"):
        load_image(saved(Image.fromarray(values.astype(np.float32)), "TIFF"), 8)


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P"])
def test_a_transparent_color_becomes_white(mode):
    image = Image.new(mode, (8, 8), 0)
    transparency = (0, 0, 0) if mode == "RGB" else 0
    assert np.asarray(load_image(saved(image, transparency=transparency), 8)).min() == 255


def test_progressive_jpeg_is_read():
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    loaded = np.asarray(load_image(saved(image, "JPEG", progressive=True, quality=95), 16))
    assert np.abs(loaded.astype(int) - (200, 100, 50)).max() <= 3


def png_header(width: int, height: int, color_type: int) -> bytes:
    """The start of a PNG file of any size, without its pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 99) + b"IDAT"


@pytest.mark.parametrize(
    ("size", "color_type", "reason"),
    [
        ((0, 8), 2, "undecodable image"),
        ((60_000, 60_000), 2, "image of more than 89,478,485 pixels"),
        ((9_000, 9_000), 6, "image of mode RGBA with more than 44,739,242 pixels"),
        ((9_000, 9_000), 2, "truncated image"),
    ],
)
def test_sizes_are_checked_before_pixels_are_read(size, color_type, reason):
    with pytest.raises(BadSample, match=reason):
        load_image(png_header(*size, color_type), 8)


@pytest.mark.parametrize(
    ("kind", "options", "per_pixel"),
    [
        ("PNG", {}, 4),
        ("JPEG", {}, 4),
        ("JPEG", {"progressive": True}, 11),
        ("WEBP", {}, 17),
        ("JPEG2000", {}, 20),
        ("AVIF", {}, 12),
        ("TIFF", {}, 8),
    ],
)
def test_the_memory_of_each_decoder_is_bounded(kind, options, per_pixel, monkeypatch):
    file = saved(Image.new("RGB", (64, 64)), kind, **options)
    monkeypatch.setattr(images, "MAX_BYTES", 64 * 64 * per_pixel)
    load_image(file, 8)
    monkeypatch.setattr(images, "MAX_BYTES", 64 * 64 * per_pixel - 1)
    with pytest.raises(BadSample, match="image of mode RGB with more than 4,095 pixels"):
        load_image(file, 8)


@pytest.mark.parametrize("kind", ["EPS", "PSD", "FLI", "BLP", "PDF", "ICNS", "PCX", "TGA", "SGI"])
def test_formats_outside_of_the_list_are_never_opened(kind, monkeypatch):
    Image.init()
    if kind in Image.OPEN:
        monkeypatch.setitem(Image.OPEN, kind, (pytest.fail, None))
    start = {
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "PSD": b"8BPS\0\1",
        "FLI": bytes(4) + b"\x11\xaf",
        "BLP": b"BLP2",
    }.get(kind, b"%PDF")
    with pytest.raises(BadSample, match="undecodable image|image file that is"):
        load_image(start + bytes(200), 8)


def test_only_the_orientation_is_read_from_exif():
    """A tag that Pillow cannot write back does not cost the image."""
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (0, 0, 16, 8))
    # Orientation 6, and XResolution as text where a ratio of numbers is expected.
    ifd = struct.pack(">H", 2) + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    ifd += struct.pack(">HHI4s", 0x011A, 2, 4, b"abc\0") + struct.pack(">I", 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">I", 8) + ifd
    loaded = np.asarray(load_image(saved(image, "JPEG", quality=95, exif=exif), 16))
    assert loaded[:, :6].min() > 200 and loaded[:, 10:].max() < 50
    broken = saved(image, "JPEG", quality=95, exif=exif[:16])
    assert np.asarray(load_image(broken, 16))[:6].max() < 50
