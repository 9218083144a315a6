"""One way from a file, bytes or a Pillow image to upright, opaque 8-bit RGB; all else is an `ImageError` with a code.

`Image.open(path).convert("RGB")` gives silently wrong pixels for many real files: sideways photos, hidden colours
behind alpha, 16-bit scans saturated to white. It also raises a dozen exception types, waits for ever on a FIFO and
decodes bombs. What is decided here:

- the format is decided by content, among `FORMATS`; of several frames the first counts;
- EXIF, XMP and TIFF orientation is applied; metadata that cannot be read is ignored, it never costs the pixels;
- transparency is composited on a background colour;
- grey with more than 8 bits is scaled linearly (16 bits: v / 257). A 16-bit file of fewer bits is scaled by the range
  it states: TIFF's BitsPerSample and MaxSampleValue, or PNG's sBIT where the values lie below it (a PNG that follows
  the standard is scaled up already). One that states none and uses 12 bits or fewer is told, because it is nearly
  black; 32-bit integers and floats have no known range and are refused, and so is LAB;
- arrays are uint8 from 0 to 255 or floats from 0 to 1: of numpy [H, W], or [H, W, C] with 1, 3 or 4 channels; of torch
  [C, H, W], as torchvision has them. Another shape, type or range is refused;
- colour profiles are ignored and CMYK is converted plainly, because SigLIP saw unmanaged pixels in training;
- bytes, pixels and JPEG scans are bounded before anything is decoded.
"""

import io
import logging
import os
import re
import stat
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from vlm.errors import ImageError
from vlm.words import shown

logger = logging.getLogger(__name__)

CODES = {
    "missing": "no file has this name",
    "unreadable": "the system refuses to open or read the file",
    "not-regular": "a directory, pipe, socket or device, not a file",
    "empty": "a file of 0 bytes, or an image without pixels",
    "unsupported-type": "no path, bytes, Pillow image, array or tensor; or an array of another shape, type or range",
    "too-large": "more bytes, pixels or JPEG scans than the limits allow",
    "not-an-image": "the content is that of no known image format",
    "unsupported-format": "an image or document of a format that is not read",
    "unsupported-mode": "pixels without a known range or colour space: 32-bit integers, floats, LAB",
    "truncated": "the pixel data ends too early",
    "corrupt": "the pixel data or the header is damaged",
}

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Pillow's names of the formats that are read. MPO, a JPEG with further pictures behind it, counts as JPEG."""

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .gif .bmp .dib .tif .tiff .avif .heic .heif .jxl .jp2".split()
)
"""Names that end so are pictures to whoever made a folder. A format that is not read (HEIC, JPEG XL, JPEG 2000) is
among them, so that it is told and not passed over."""

MAX_SCAN_COVERS = 16
"""How often the scans of a JPEG may cover `max_pixels`; progressive files have about ten scans, a bomb thousands."""

# What Pillow raises on damaged files, found by feeding it damaged files. DecompressionBombError is handled by name.
_PILLOW_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC, _MAX_SAMPLE_VALUE = 274, 258, 262, 281
_ADVICE = "convert it to PNG or JPEG"
# (pattern at the start of the content, what it is, code)
_OTHER_CONTENT = [
    (rb"....ftyp(hei|hev|mif1|msf1)", "a HEIC/HEIF image (Pillow needs the pillow-heif plugin)", "unsupported-format"),
    (rb"....ftypavi[fs]", "an AVIF image, damaged or beyond this version of Pillow", "corrupt"),
    (rb"....ftyp", "a video (ISO media)", "unsupported-format"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "a JPEG XL image", "unsupported-format"),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 image", "unsupported-format"),
    (rb"8BPS", "a Photoshop file", "unsupported-format"),
    (rb"%PDF", "a PDF document", "unsupported-format"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file", "unsupported-format"),
    (rb"P[1-7fF][\s#]", "a PNM image", "unsupported-format"),
    (rb"\x00\x00[\x01\x02]\x00", "an icon", "unsupported-format"),
    (
        rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg",
        "an SVG",
        "unsupported-format",
    ),
    (rb"PK\x03\x04", "a ZIP archive", "not-an-image"),
    (rb"\x1f\x8b", "a gzip file", "not-an-image"),
    (rb"version https://git-lfs", "a Git LFS pointer; fetch the file with `git lfs pull`", "not-an-image"),
    (rb"(\xef\xbb\xbf)?\s*<", "a web page or XML, perhaps a failed download", "not-an-image"),
    (rb"(\xef\xbb\xbf)?\s*[{\[]", "JSON text", "not-an-image"),
    (rb"\xff\xd8\xff|\x89PNG|GIF8|BM|II\*\x00|MM\x00\*|RIFF....WEBP", "an image whose header is damaged", "corrupt"),
]


ImageInput = Any
"""What an image may be given as: str | Path | FilePart | bytes | Pillow image | numpy array | torch tensor (see
`load_image`)."""


@dataclass(frozen=True)
class FilePart:
    """An image inside a larger file, such as a member of a tar archive; its bytes are read when it is decoded.

    Attributes:
        path: the file. offset, size: where in it, in bytes.
        member: its name in there.
    """

    path: Path
    offset: int
    size: int
    member: str

    def __str__(self) -> str:
        return f"{self.path}/{self.member}"


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """Bounds that are checked before decoding."""

    max_bytes: int = 64 * 2**20
    """Size of the file."""
    max_pixels: int = 64_000_000
    """Width times height, from the header."""


DEFAULT_LIMITS = ImageLimits()


def load_image(
    source: ImageInput,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    limits: ImageLimits = DEFAULT_LIMITS,
) -> Image.Image:
    """An image as an upright Pillow image of mode RGB.

    Args:
        source: path, part of a file, encoded bytes, Pillow image, or array: numpy uint8 (0 to 255) or float (0 to 1)
            of shape [H, W] or [H, W, C] with 1, 3 or 4 channels, torch of shape [C, H, W]. A Pillow image that is
            upright RGB already comes back as it is.
        background: red, green and blue, 0 to 255, that show through transparent pixels.
        limits: bounds on the size.

    Raises:
        ImageError: whatever is wrong with the image; `code` is a key of `CODES`.
    """
    image, name, data = _opened(source, limits)
    try:
        with warnings.catch_warnings():
            # Pillow warns about odd metadata of files that decode well.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            image.load()
            method = _TRANSPOSE.get(_orientation(image))
            flat = _flatten(image, background, name, data)
            if flat is image is not source:
                flat = image.copy()  # lets go of the encoded bytes, which a Pillow file image keeps
            return flat if method is None else flat.transpose(method)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too-large", f"{name}: {error}") from error
    except _PILLOW_ERRORS as error:
        raise _damaged(error, name) from error


def image_size(source: ImageInput, *, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """(width, height) that `load_image` will give, without decoding pixels (but of a PNG that says how it is turned).

    Raises:
        ImageError: the file cannot be opened as an image. That its pixels are whole only decoding can tell.
    """
    image, _, data = _opened(source, limits)
    # Pillow decodes a PNG to find EXIF behind its pixels.
    if image.format == "PNG" and data and not re.search(rb"eXIf|[Ee]xif|xmp", data):
        return image.size
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        turned = _orientation(image) >= 5  # 5 to 8 change rows and columns
    return (image.height, image.width) if turned else image.size


def is_image(value: Any) -> bool:
    """Whether a value is one image, and not several (or a text that was meant for something else)."""
    return isinstance(value, str | Path | FilePart | bytes | Image.Image) or (_is_array(value) and value.ndim <= 3)


def _opened(source: ImageInput, limits: ImageLimits) -> tuple[Image.Image, str, bytes]:
    """(image, its name for messages, the bytes it was opened from if any); nothing is decoded yet."""
    if isinstance(source, Image.Image):
        name = f"{source.format or 'Pillow'} image of {source.width}x{source.height} px"
        if not source.width or not source.height:
            raise ImageError("empty", f"{name}: it has no pixels")
        return source, name, b""
    if _is_array(source):
        image, name = _from_array(source, limits)
        return image, name, b""
    if not isinstance(source, str | Path | FilePart | bytes):
        raise ImageError(
            "unsupported-type",
            f"an image of type {type(source).__name__}; give a path, bytes, a Pillow image, a numpy array or a torch"
            " tensor",
        )
    name = f"image of {len(source)} bytes" if isinstance(source, bytes) else shown(str(source))
    data = source if isinstance(source, bytes) else _read_file(source, name, limits.max_bytes)
    return _open(data, name, limits), name, data


def _is_array(value: Any) -> bool:
    """A numpy array or a torch tensor, without importing either."""
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(value).__mro__}
    return bool(kinds & {"numpy.ndarray", "torch.Tensor"})


def _from_array(value: Any, limits: ImageLimits) -> tuple[Image.Image, str]:
    """An array or tensor as a Pillow image of mode L, RGB or RGBA, and its name for messages.

    Raises:
        ImageError: another shape, type or range.
    """
    import numpy as np

    is_numpy = isinstance(value, np.ndarray)
    kind = str(value.dtype).removeprefix("torch.")
    name = f"{'array' if is_numpy else 'tensor'} of {kind}{list(value.shape)}"
    wanted = "[H, W] or [H, W, C]" if is_numpy else "[C, H, W] or [H, W]"
    channels = 1 if value.ndim == 2 else value.shape[-1 if is_numpy else 0] if value.ndim == 3 else 0
    if channels not in (1, 3, 4):
        other = value.ndim == 3 and value.shape[0 if is_numpy else -1] in (1, 3, 4)
        turn = "; use .transpose(1, 2, 0)" if is_numpy else "; use .permute(2, 0, 1)"
        raise ImageError(
            "unsupported-type", f"{name}: expected {wanted} with 1, 3 or 4 channels{turn if other else ''}"
        )
    if not is_numpy:
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
        value = value.transpose(1, 2, 0) if value.ndim == 3 else value
    if not value.size:
        raise ImageError("empty", f"{name}: it has no pixels")
    if value.shape[0] * value.shape[1] > limits.max_pixels:
        raise ImageError("too-large", f"{name}: at most {limits.max_pixels:,} pixels are read, make it smaller")
    if value.dtype.kind == "f":
        low, high = float(value.min()), float(value.max())
        if not (low >= 0 and high <= 1):
            raise ImageError(
                "unsupported-type",
                f"{name}: values from {low:g} to {high:g}; floats are read from 0 to 1, and uint8 from 0 to 255",
            )
        value = np.rint(value.astype(np.float32) * 255).astype(np.uint8)
    if value.dtype != np.uint8:
        raise ImageError(
            "unsupported-type", f"{name}: {kind} has no known range; give uint8 (0 to 255) or floats from 0 to 1"
        )
    flat = value[..., 0] if value.ndim == 3 and channels == 1 else value
    return Image.fromarray(np.ascontiguousarray(flat)), name


def _read_file(source: str | Path | FilePart, name: str, max_bytes: int) -> bytes:
    """The bytes of a regular file of bounded size, or of a part. Never waits: a FIFO opens at once, and is refused."""
    path = source.path if isinstance(source, FilePart) else source
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("not-regular", f"{name}: a directory, pipe or device; expected an image file")
            size = source.size if isinstance(source, FilePart) else status.st_size
            if size > max_bytes:
                raise _too_many_bytes(name, size, max_bytes)
            with open(descriptor, "rb", closefd=False) as file:
                if isinstance(source, FilePart):
                    file.seek(source.offset)
                    return file.read(size)
                data = file.read(max_bytes + 1)  # the file may be growing
        finally:
            os.close(descriptor)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError("missing", f"{name}: no such file{_no_urls(name)}") from error
    except OSError as error:
        raise ImageError("unreadable", f"{name}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL byte or a lone surrogate in the name
        raise ImageError("missing", f"{name}: no file can have this name ({error})") from error
    if len(data) > max_bytes:
        raise _too_many_bytes(name, len(data), max_bytes)
    return data


def _no_urls(name: str) -> str:
    return " (URLs are not fetched; download it first)" if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", name) else ""


def _too_many_bytes(name: str, got: int, limit: int) -> ImageError:
    return ImageError("too-large", f"{name}: {got:,} bytes; at most {limit:,} are read, {_ADVICE} or make it smaller")


def _open(data: bytes, name: str, limits: ImageLimits) -> Image.Image:
    """A Pillow image whose header has been read and whose size is within the limits; nothing is decoded yet."""
    if not data:
        raise ImageError("empty", f"{name}: empty; fetch or export it again")
    if len(data) > limits.max_bytes:
        raise _too_many_bytes(name, len(data), limits.max_bytes)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            image = Image.open(io.BytesIO(data), formats=_known_formats())
    except UnidentifiedImageError as error:
        raise _unidentified(data, name) from error
    except Image.DecompressionBombError as error:
        raise ImageError("too-large", f"{name}: {error}") from error
    except _PILLOW_ERRORS as error:
        raise _damaged(error, name) from error
    pixels = image.width * image.height
    if pixels == 0:
        raise ImageError("corrupt", f"{name}: the header says {image.width}x{image.height} px")
    if pixels > limits.max_pixels:
        size = f"{image.width}x{image.height} = {pixels:,} px"
        raise ImageError("too-large", f"{name}: {size}; at most {limits.max_pixels:,} are decoded, make it smaller")
    if image.format in ("JPEG", "MPO"):
        # Inside coded data 0xff is always followed by 0 or a restart mark, so this counts real scans.
        scans = data.count(b"\xff\xda")
        if scans * pixels > MAX_SCAN_COVERS * limits.max_pixels:
            raise ImageError("too-large", f"{name}: a JPEG of {scans} scans of {pixels:,} px; save it as baseline JPEG")
    return image


def _known_formats() -> list[str]:
    """`FORMATS` without what this Pillow was built without (it raises KeyError for names it does not know)."""
    if "WEBP" not in Image.OPEN:
        Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _unidentified(data: bytes, name: str) -> ImageError:
    for pattern, what, code in _OTHER_CONTENT:
        if re.match(pattern, data[:1024], re.DOTALL):
            advice = f"; {_ADVICE}" if code == "unsupported-format" else ""
            return ImageError(code, f"{name}: the content is {what}{advice}")
    return ImageError("not-an-image", f"{name}: the content is no image; expected one of {', '.join(FORMATS)}")


def _damaged(error: BaseException, name: str) -> ImageError:
    """The refusal for an exception of Pillow's."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, MemoryError) or "too large" in text.lower():
        return ImageError("too-large", f"{name}: too large to decode ({text})")
    truncated = isinstance(error, EOFError) or "truncated" in text.lower()
    return ImageError("truncated" if truncated else "corrupt", f"{name}: damaged image data ({text}); fetch it again")


def _orientation(image: Image.Image) -> int:
    """How the picture is turned, 1 to 8, as its EXIF or XMP says; 1 (upright) where that cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _PILLOW_ERRORS:
        return 1
    return value if isinstance(value, int) else 1


def _flatten(image: Image.Image, background: tuple[int, int, int], name: str, data: bytes) -> Image.Image:
    """Any mode to RGB, transparency composited on the background."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = _to_8_bits(image, name, data)
    if image.mode in ("I", "F", "LAB") or image.mode.startswith("I;"):
        what = {"LAB": "LAB colours", "F": "32-bit float pixels"}.get(image.mode, "32-bit integer pixels")
        raise ImageError("unsupported-mode", f"{name}: {what}; their range is not known, convert it to 8-bit RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        layers = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, layers).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image: Image.Image, name: str, data: bytes) -> Image.Image:
    """Grey of 9 to 16 bits as L, or as LA where a PNG names one transparent value; scaled linearly and rounded.

    Pillow's own conversion cuts everything above 255 to white.
    """
    import numpy as np

    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image).astype(np.uint32)
    top = _top(values, tags, _significant_bits(data) if image.format == "PNG" else None, name)
    grey = ((np.minimum(values, top) * 255 + top // 2) // top).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero; Pillow turns these round for 8 bits only
        grey = 255 - grey
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return Image.fromarray(grey)
    alpha = np.where(values == key, 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))


def _top(values: Any, tags: Any, significant: int | None, name: str) -> int:
    """The value that is white. See the module's docstring for who says so."""
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    full, most = 2**bits - 1, int(values.max())
    stated = tags.get(_MAX_SAMPLE_VALUE, ())
    stated = stated[0] if isinstance(stated, tuple) and stated else stated
    if isinstance(stated, int) and 255 <= stated < full and most <= stated:
        return stated
    if significant is not None and 8 <= significant < bits and most < 2**significant:
        # Scaled up as the standard wants it, so dark a picture would have zeros in its low bits.
        if (values & (2 ** (bits - significant) - 1)).any():
            return 2**significant - 1
        return full
    if bits == 16 and 0 < most < 4096:
        _tell_of_range(name, most)
    return full


def _significant_bits(data: bytes) -> int | None:
    """What a grey PNG says about its bits (sBIT), if anything."""
    found = re.search(rb"\0\0\0\x01sBIT(.)", data[: data.find(b"IDAT")], re.DOTALL)
    return found[1][0] if found else None


_dark: set[str] = set()
_MOST_DARK = 10


def _tell_of_range(name: str, most: int) -> None:
    """Say once per file, and of so many files, that its values leave the upper bits empty."""
    if name in _dark or len(_dark) >= _MOST_DARK:
        return
    _dark.add(name)
    bits = max(8, most.bit_length())
    last = " (more of this kind are not told)" if len(_dark) == _MOST_DARK else ""
    logger.warning(
        "%s: 16-bit grey whose values end at %d of 65,535, as those of %d bits in a 16-bit file do; it is read as it"
        " is, nearly black. If white is %d, multiply by %.4g, or save it as 8 bit%s",
        *(name, most, bits, 2**bits - 1, 65535 / (2**bits - 1), last),
    )
