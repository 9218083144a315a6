import io
import os
import pickle
import stat
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin

from vlm.build.presets import tiny
from vlm.errors import ImageError
from vlm.images import load as images
from vlm.images.load import CODES, ImageLimits, image_size, load_image
from vlm.words import shown

Image.init()
AVIF = ["AVIF"] if "AVIF" in Image.SAVE else []  # from Pillow 11.3 on, where it was built with it
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *AVIF]
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def corners(width: int = 32, height: int = 16) -> Image.Image:
    """Red top left, green top right, blue bottom left, white bottom right."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def colours(image: Image.Image) -> list[tuple[int, ...]]:
    """The colours near the four corners, rounded so that JPEG noise does not count."""
    assert image.mode == "RGB"
    right, bottom = image.width - 3, image.height - 3
    pixels = [image.getpixel(at) for at in ((2, 2), (right, 2), (2, bottom), (right, bottom))]
    return [tuple(255 * round(channel / 255) for channel in pixel) for pixel in pixels]  # type: ignore[union-attr]


def refusal(source: Any, **options: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    assert caught.value.code in CODES
    assert "\n" not in str(caught.value)
    return caught.value


def noise(width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- what is read


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read_by_its_content(format: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.txt"
    path.write_bytes(encode(corners(), format))
    image = load_image(path)
    assert image.size == (32, 16)
    assert colours(image) == [RED, GREEN, BLUE, WHITE]
    assert colours(load_image(str(path))) == colours(load_image(path.read_bytes())) == colours(image)


# Orientation n as the EXIF standard defines it: what the stored picture must be so that it is upright when shown.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", *AVIF])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(corners()))))
    exif = Image.Exif()
    exif[274] = orientation
    image = load_image(encode(stored, format, exif=exif.tobytes()))
    assert image.size == (32, 16)
    assert colours(image) == [RED, GREEN, BLUE, WHITE]


def test_orientation_of_xmp_and_of_a_pillow_image() -> None:
    sideways = Image.fromarray(np.ascontiguousarray(STORED[6](np.asarray(corners()))))
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>')
    data = encode(sideways, "PNG", pnginfo=info)
    assert colours(load_image(data)) == [RED, GREEN, BLUE, WHITE]
    assert colours(load_image(Image.open(io.BytesIO(data)))) == [RED, GREEN, BLUE, WHITE]


BROKEN_EXIF = [
    b"",
    b"Exif\0\0",
    b"Exif\0\0nonsense",
    b"Exif\0\0II*\0",
    b"Exif\0\0II*\0\xff\xff\xff\xff",
    b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
    # an IFD whose next-IFD and EXIF pointers lead back to itself
    b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<I", 8),
    b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 274, 3, 1, 99) + bytes(4),  # orientation 99
    b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 274, 2, 4, 99) + bytes(4),  # orientation as text
    b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 274, 5, 1, 8) + bytes(4),  # a rational, division by 0
]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", BROKEN_EXIF, ids=range(len(BROKEN_EXIF)))
def test_broken_metadata_never_costs_the_pixels(format: str, exif: bytes) -> None:
    data = encode(corners(), format, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colours(load_image(data)) == [RED, GREEN, BLUE, WHITE]


def test_a_tiff_with_a_broken_exif_pointer_keeps_its_pixels() -> None:
    data = encode(corners(), "TIFF", tiffinfo={0x8769: 0x7FFFFFF0})
    assert colours(load_image(data)) == [RED, GREEN, BLUE, WHITE]


def half_transparent(mode: str) -> Image.Image:
    """The left half opaque red (grey 255), the right half transparent with a hidden green (grey 7)."""
    image = Image.new("RGBA", (16, 8), (*RED, 255))
    image.paste((0, 255, 0, 0), (8, 0, 16, 8))
    return image.convert(mode)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", *AVIF])
def test_hidden_colours_never_show(format: str) -> None:
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    data = encode(half_transparent("RGBA"), format, **options)
    assert colours(load_image(data)) == [RED, WHITE, RED, WHITE]
    assert colours(load_image(data, background=BLUE)) == [RED, BLUE, RED, BLUE]


def test_half_opacity_blends() -> None:
    data = encode(Image.new("RGBA", (4, 4), (255, 0, 0, 51)), "PNG")  # one fifth red on four fifths blue
    assert load_image(data, background=BLUE).getpixel((0, 0)) == (51, 0, 204)


def test_every_kind_of_transparency() -> None:
    grey = Image.new("L", (16, 8), 0)
    grey.paste(7, (8, 0, 16, 8))
    colour = Image.new("RGB", (16, 8), RED)
    colour.paste((1, 2, 3), (8, 0, 16, 8))
    palette = Image.new("P", (16, 8), 0)
    palette.putpalette([*RED, *GREEN])
    palette.paste(1, (8, 0, 16, 8))
    shapes: list[tuple[Image.Image | bytes, tuple[int, int, int]]] = [
        (encode(half_transparent("LA"), "PNG"), (76, 76, 76)),
        (encode(grey, "PNG", transparency=7), (0, 0, 0)),
        (encode(colour, "PNG", transparency=(1, 2, 3)), RED),
        (encode(palette, "PNG", transparency=1), RED),
        (encode(palette, "GIF", transparency=1), RED),
        (half_transparent("RGBA").convert("RGBa"), RED),
        (half_transparent("LA").convert("La"), (76, 76, 76)),
    ]
    for source, left in shapes:
        image = load_image(source, background=BLUE)
        assert image.getpixel((2, 2)) == left
        assert image.getpixel((13, 2)) == BLUE


def tiff16(values: np.ndarray, bits: int = 16, photometric: int = 1) -> bytes:
    """An uncompressed little-endian grey TIFF of 16 bits per value."""
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, values.nbytes)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + values.nbytes) + values.astype("<u2").tobytes() + directory + bytes(4)


def test_16_bit_grey_is_scaled_linearly() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535, 65406, 65407]], dtype=np.uint16)
    expected = [round(value / 257) for value in values[0].tolist()]
    assert expected == [0, 0, 1, 1, 128, 255, 254, 255]
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    for source in (image, encode(image, "PNG"), encode(image, "TIFF"), tiff16(values)):
        rgb = np.asarray(load_image(source))
        assert rgb.shape == (1, 8, 3)
        assert [rgb[0, :, channel].tolist() for channel in range(3)] == [expected] * 3
    assert np.asarray(load_image(tiff16(values, photometric=0)))[0, :, 0].tolist() == [255 - v for v in expected]


def test_16_bit_grey_turned_and_with_a_transparent_value() -> None:
    values = np.array([[0, 65535], [65535, 65535], [300, 300]], dtype=np.uint16)
    exif = Image.Exif()
    exif[274] = 8
    data = encode(Image.fromarray(values), "PNG", exif=exif.tobytes(), transparency=300)
    rgb = np.asarray(load_image(data, background=(10, 20, 30)))
    white, black, see_through = [255] * 3, [0] * 3, [10, 20, 30]
    assert rgb.tolist() == [[white, white, see_through], [black, white, see_through]]


def test_12_bit_grey_is_white_at_4095() -> None:
    # Two values of 12 bits fill three bytes: 4095 and 2048, then 0 and 15.
    packed = bytes.fromhex("fff80000000f")
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(packed))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    data = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory + bytes(4)
    assert np.asarray(load_image(data))[0, :, 0].tolist() == [255, 128, 0, 1]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGBX", "HSV"])
def test_ordinary_modes_become_rgb(mode: str) -> None:
    assert colours(load_image(Image.new("RGB", (8, 8), WHITE).convert(mode))) == [WHITE] * 4


def test_cmyk_files_are_not_negatives() -> None:
    for format in ("JPEG", "TIFF"):
        assert colours(load_image(encode(corners().convert("CMYK"), format))) == [RED, GREEN, BLUE, WHITE]


def test_only_the_first_frame_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), BLUE)] * 3
    for format in ("GIF", "PNG", "WEBP", "TIFF", "MPO", *AVIF):
        data = encode(Image.new("RGB", (8, 8), RED), format, save_all=True, append_images=frames)
        assert colours(load_image(data)) == [RED] * 4


def test_thin_images_are_read() -> None:
    assert load_image(encode(Image.new("RGB", (1, 10000)), "PNG")).size == (1, 10000)
    assert load_image(encode(Image.new("RGB", (65500, 1)), "JPEG")).size == (65500, 1)
    assert load_image(encode(Image.new("RGB", (1, 1)), "GIF")).size == (1, 1)


def test_an_rgb_pillow_image_comes_back_as_it_is() -> None:
    image = corners()
    assert load_image(image) is image
    lazy = Image.open(io.BytesIO(encode(image, "PNG")))
    assert colours(load_image(lazy)) == colours(image)


# --- what is refused


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("format", FORMATS)
def test_cut_files_are_refused(format: str, keep: float) -> None:
    data = encode(noise(), format, **({"quality": 90} if format == "JPEG" else {}))
    error = refusal(data[: int(len(data) * keep)])
    assert error.code in ("truncated", "corrupt")


def test_a_cut_jpeg_is_truncated_and_a_progressive_one_too() -> None:
    for options in ({}, {"progressive": True}):
        data = encode(noise(), "JPEG", **options)
        error = refusal(data[: len(data) * 9 // 10])
        assert error.code == "truncated"
        assert "fetch it again" in str(error)


def test_damaged_files_are_refused() -> None:
    png = encode(noise(), "PNG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    assert refusal(bytes(flipped)).code == "corrupt"
    assert refusal(png[:20]).code in ("corrupt", "truncated")
    assert refusal(encode(noise(), "JPEG")[:3] + b"nonsense").code == "corrupt"
    as_text = png.replace(b"\r\n", b"\n")  # a transfer in text mode
    assert refusal(as_text).code == "corrupt"


CONTENTS = [
    (b"", "empty", "empty"),
    (b"<!DOCTYPE html><html>404</html>", "not-an-image", "web page"),
    (b'{"error": "not found"}', "not-an-image", "JSON"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "not-an-image", "git lfs pull"),
    (b"PK\x03\x04rest", "not-an-image", "ZIP"),
    (b"just some words", "not-an-image", "expected one of JPEG, PNG"),
    (bytes(100), "not-an-image", "no image"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported-format", "pillow-heif"),
    (b"\0\0\0\x18ftypmp42\0\0\0\0isom", "unsupported-format", "video"),
    (b"\xff\x0a rest", "unsupported-format", "JPEG XL"),
    (b"%PDF-1.7", "unsupported-format", "PDF"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported-format", "PostScript"),
    (b'<?xml version="1.0"?>\n<!-- a -->\n<svg xmlns="x"/>', "unsupported-format", "SVG"),
    (b"P6\n1 1\n255\nabc", "unsupported-format", "PNM"),
]


@pytest.mark.parametrize(("data", "code", "says"), CONTENTS)
def test_other_content_is_named(data: bytes, code: str, says: str) -> None:
    error = refusal(data)
    assert (error.code, says in str(error)) == (code, True), str(error)


@pytest.mark.parametrize("format", ["ICO", "PPM", "TGA", "EPS", "JPEG2000", "PCX", "SGI"])
def test_formats_outside_the_list_are_refused(format: str) -> None:
    assert refusal(encode(corners(), format)).code in ("unsupported-format", "not-an-image")


def test_pixels_without_a_known_range_are_refused() -> None:
    for mode in ("I", "F"):
        assert refusal(encode(Image.new(mode, (8, 8)), "TIFF")).code == "unsupported-mode"
        assert refusal(Image.new(mode, (8, 8))).code == "unsupported-mode"
    assert refusal(encode(Image.new("LAB", (8, 8)), "TIFF")).code == "unsupported-mode"


def png_header(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 1-bit grey that claims a size, with further chunks and almost no data."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    parts = [header, *chunks, (b"IDAT", zlib.compress(bytes(64))), (b"IEND", b"")]
    made = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def test_bombs_are_refused_from_the_header() -> None:
    for width, height in ((20_000, 20_000), (12_000, 12_000), (9_400, 9_400), (8_001, 8_000)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert refusal(png_header(width, height)).code == "too-large"
    gif = bytearray(encode(corners(), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    assert refusal(bytes(gif)).code == "too-large"
    assert refusal(png_header(0, 8)).code == "corrupt"
    profile = b"icc\0\0" + zlib.compress(bytes(100_000_000))
    assert refusal(png_header(8, 8, (b"iCCP", profile))).code == "too-large"


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once() -> None:
    data = encode(Image.new("RGB", (2000, 2000)), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    assert load_image(data).size == (2000, 2000)
    assert refusal(data[:start] + data[start:-2] * 300 + data[-2:]).code == "too-large"


def test_limits_can_be_set() -> None:
    data = encode(corners(), "PNG")
    assert load_image(data, limits=ImageLimits(max_pixels=32 * 16, max_bytes=len(data))).size == (32, 16)
    assert refusal(data, limits=ImageLimits(max_pixels=32 * 16 - 1)).code == "too-large"
    assert refusal(data, limits=ImageLimits(max_bytes=len(data) - 1)).code == "too-large"


# --- files


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.png"
    os.mkfifo(fifo)
    assert refusal(fifo).code == "not-regular"
    assert refusal(tmp_path).code == "not-regular"
    assert refusal("/dev/zero").code == "not-regular"
    dangling, loop = tmp_path / "dangling.png", tmp_path / "loop.png"
    dangling.symlink_to(tmp_path / "gone.png")
    loop.symlink_to(loop)
    assert refusal(dangling).code == "missing"
    assert refusal(loop).code == "unreadable"


def test_a_huge_sparse_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(6 * 2**30)
    error = refusal(path)
    assert error.code == "too-large"
    assert f"{6 * 2**30:,} bytes; at most {64 * 2**20:,}" in str(error)


@pytest.mark.parametrize("name", ["nul\0.png", "x" * 5000, "a\nb.png", "\udcff.png", "https://x.org/a.png", "~/a.png"])
def test_names_that_are_no_file(name: str, tmp_path: Path) -> None:
    error = refusal(name)
    assert error.code in ("missing", "unreadable")
    assert len(str(error)) < 500
    str(error).encode()


def test_a_url_is_never_fetched() -> None:
    assert "URLs are not fetched" in str(refusal("http://169.254.169.254/latest"))


def test_odd_names_are_read_and_escaped(tmp_path: Path) -> None:
    for name in ("a\nb.png", "\u202egnp.png", os.fsdecode(b"\xff.png"), "\x1b[31m.png"):
        path = tmp_path / name
        path.write_bytes(encode(corners(), "PNG"))
        assert colours(load_image(path)) == [RED, GREEN, BLUE, WHITE]
        assert shown(path).isascii() and shown(path).isprintable()
    assert shown("plain/Straße 1.jpg") == "plain/Straße 1.jpg"


def test_the_file_and_its_descriptor_are_let_go(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(encode(corners(), "GIF", save_all=True, append_images=[corners()]))
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        load_image(path)
        refusal(bad)
        refusal(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(corners(), "PNG"))
    path.chmod(stat.S_IWUSR)
    assert refusal(path).code == "unreadable"


def test_an_error_crosses_process_borders() -> None:
    error = pickle.loads(pickle.dumps(refusal(b"")))
    assert (type(error), error.code, str(error)) == (ImageError, "empty", str(refusal(b"")))


def test_mutated_files_raise_nothing_but_image_errors() -> None:
    rng = np.random.default_rng(0)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    exif = Image.Exif()
    exif[274] = 6
    refused = 0
    for format in FORMATS:
        original = encode(corners(), format, **({} if format in ("GIF", "BMP") else {"exif": exif.tobytes()}))
        for _ in range(150):
            data = bytearray(original)
            for _ in range(int(rng.integers(1, 8))):
                data[int(rng.integers(len(data)))] = int(rng.integers(256))
            try:
                assert load_image(bytes(data), limits=ImageLimits(max_pixels=10**6)).mode == "RGB"
            except ImageError as error:
                assert error.code in CODES
                refused += 1
    assert refused > 100


def ramp(top: int) -> np.ndarray[Any, Any]:
    """uint16[4, 64]: 256 values from 0 to `top`."""
    return np.linspace(0, top, 256).round().astype(np.uint16).reshape(4, 64)


def test_an_image_without_pixels_is_refused() -> None:
    for size in ((0, 4), (4, 0), (0, 0)):
        error = refusal(Image.new("RGB", size))
        assert error.code == "empty" and f"{size[0]}x{size[1]} px: it has no pixels" in str(error)
        with pytest.raises(ImageError):
            image_size(Image.new("RGB", size))
    for array in (np.zeros((0, 4, 3), np.uint8), np.zeros((4, 0), np.uint8), torch.zeros(3, 0, 4)):
        assert refusal(array).code == "empty"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(images, "_dark", set())
    return caplog


def test_12_bits_in_16_are_scaled_by_what_the_file_states(told: pytest.LogCaptureFixture) -> None:
    """The right values by hand: v * 255 / 4095, rounded."""
    values = ramp(4095)
    right = np.floor(values.astype(float) * 255 / 4095 + 0.5).astype(np.uint8)
    assert right.max() == 255 and right.min() == 0
    # Pillow writes no sBIT; a chunk is length, name, content, checksum, and it belongs behind the header (33 bytes).
    plain = encode(Image.fromarray(values), "PNG")
    chunk = b"sBIT" + bytes([12])
    stated = plain[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + plain[33:]
    tiff = encode(Image.fromarray(values), "TIFF", tiffinfo={281: 4095})
    for data in (stated, tiff):
        assert np.array_equal(np.asarray(load_image(data))[..., 0], right)
    assert not told.records


def test_a_png_that_follows_the_standard_is_scaled_up_already(told: pytest.LogCaptureFixture) -> None:
    """sBIT 12 beside samples of 16 bits (shifted, low bits repeated): v / 257, for a dark picture too."""
    for top in (4095, 200):
        values = ramp(top)
        scaled = (values << 4) | (values >> 8)
        plain = encode(Image.fromarray(scaled.astype(np.uint16)), "PNG")
        chunk = b"sBIT" + bytes([12])
        data = plain[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + plain[33:]
        right = np.floor(scaled / 257 + 0.5).astype(np.uint8)
        assert np.array_equal(np.asarray(load_image(data))[..., 0], right)
    assert not told.records


def test_a_range_that_is_not_stated_is_told_once(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "scan.png"
    Image.fromarray(ramp(4071)).save(path)
    right = np.floor(ramp(4071) / 257 + 0.5).astype(np.uint8)
    for _ in range(3):
        assert np.array_equal(np.asarray(load_image(path))[..., 0], right)
    (record,) = told.records
    assert f"{path}: 16-bit grey whose values end at 4071 of 65,535, as those of 12 bits" in record.message
    assert "If white is 4095, multiply by 16" in record.message
    for number in range(20):
        Image.fromarray(ramp(4000)).save(tmp_path / f"{number}.png")
        load_image(tmp_path / f"{number}.png")
    assert len(told.records) == 10
    Image.fromarray(ramp(65535)).save(path)
    load_image(path)
    assert len(told.records) == 10


def test_arrays_and_tensors_have_a_stated_range() -> None:
    """Every way to give the same pixels, exactly; floats are rounded to the nearest of 256 steps."""
    picture = noise(6, 5)
    pixels = np.asarray(picture)
    channels_first = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    ways: list[Any] = [
        pixels,
        pixels / 255,
        (pixels / 255).astype(np.float32),
        np.asfortranarray(pixels),
        channels_first,
        channels_first / 255,
        (channels_first / 255).double().requires_grad_(),
    ]
    for way in ways:
        assert np.array_equal(np.asarray(load_image(way)), pixels) and image_size(way) == (6, 5)
    grey = pixels[..., 0]
    for way in (grey, grey[..., None], torch.from_numpy(grey.copy()), torch.from_numpy(grey.copy())[None]):
        assert np.array_equal(np.asarray(load_image(way)), np.repeat(grey[..., None], 3, 2))
    clear = np.dstack([pixels, np.zeros((5, 6), np.uint8)])
    assert np.asarray(load_image(clear)).min() == 255  # transparent: the white background


ARRAYS: list[tuple[Any, str, str]] = [
    (np.zeros((3, 8, 9), np.uint8), "unsupported-type", "channels; use .transpose(1, 2, 0)"),
    (torch.zeros(8, 9, 3), "unsupported-type", "channels; use .permute(2, 0, 1)"),
    (np.zeros((1, 8, 9, 3), np.uint8), "unsupported-type", "expected [H, W] or [H, W, C] with 1, 3 or 4 channels"),
    (np.zeros((8, 9, 2), np.uint8), "unsupported-type", "array of uint8[8, 9, 2]"),
    (np.zeros((8, 9, 3), np.float32) + 200, "unsupported-type", "values from 200 to 200; floats are read from 0 to 1"),
    (np.zeros((8, 9, 3)) - 1, "unsupported-type", "values from -1 to -1"),
    (np.full((8, 9, 3), np.nan), "unsupported-type", "values from nan to nan"),
    (np.zeros((8, 9), np.uint16), "unsupported-type", "uint16 has no known range; give uint8 (0 to 255)"),
    (np.zeros((8, 9, 3), np.int64), "unsupported-type", "int64 has no known range"),
    (np.zeros((8, 9), bool), "unsupported-type", "bool has no known range"),
    (np.zeros((8, 9, 3), object), "unsupported-type", "object has no known range"),
    (torch.zeros(3, 8, 9, dtype=torch.int32), "unsupported-type", "tensor of int32[3, 8, 9]: int32 has no known range"),
    (np.broadcast_to(np.uint8(0), (9000, 9000)), "too-large", "at most 64,000,000 pixels"),
    (3, "unsupported-type", "an image of type int; give a path, bytes, a Pillow image"),
    (None, "unsupported-type", "an image of type NoneType"),
    (io.BytesIO(b""), "unsupported-type", "an image of type BytesIO"),
    (bytearray(b"x"), "unsupported-type", "an image of type bytearray"),
    ([1, 2], "unsupported-type", "an image of type list"),
]


@pytest.mark.parametrize(("value", "code", "says"), ARRAYS)
def test_other_arrays_are_refused_in_a_sentence(value: Any, code: str, says: str) -> None:
    error = refusal(value)
    assert error.code == code and says in str(error)


def test_a_processor_takes_arrays_alone_in_lists_and_in_batches() -> None:
    processor = tiny()[1]
    pixels = [np.asarray(noise(28, 28)), np.asarray(noise(30, 40))]
    wanted = processor([Image.fromarray(one) for one in pixels], ["a", "b"]).pixel_values
    tensors = [torch.from_numpy(one.transpose(2, 0, 1).copy()) for one in pixels]
    assert wanted is not None
    for given in (pixels, tensors, [[pixels[0]], [tensors[1]]]):
        assert torch.equal(processor(given, ["a", "b"]).pixel_values, wanted)  # type: ignore[arg-type]
    assert torch.equal(processor(pixels[0], "a").pixel_values, wanted[:1])  # type: ignore[arg-type]
    stacked = np.stack([pixels[0], pixels[0]])
    assert torch.equal(processor(stacked, ["a", "b"]).pixel_values, wanted[[0, 0]])  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="sample 'x': array of int64"):
        processor([pixels[0].astype(np.int64)], ["a"], ids=["x"])
