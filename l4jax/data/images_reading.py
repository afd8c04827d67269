"""Images from wherever they are, as upright 8-bit RGB on white.

Nothing is downloaded, and nothing but the formats below is opened: some of those that Pillow knows
run another program on the file. Files of others should come as bytes or data: URLs; a path in a
message reads whatever this process may read.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import threading
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_WANTED = f"use one of {', '.join(FORMATS)}"
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_DATA = re.compile(r"data:(?P<kind>[^,]*?)(?P<base64>;base64)?,", re.IGNORECASE)
_ORIENTATION = 0x0112
# By the value of EXIF's Orientation: what turns the stored image upright (EXIF 2.32, §4.6.4).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Python's warning filters belong to the whole process.
_FILTERS = threading.Lock()


def read(source: Any, *, name: str | None = None) -> Image.Image:
    """The image in `source`, as its camera saw it, in RGB.

    Rotation that EXIF asks for is carried out, transparency is laid on white, 16-bit grey is
    scaled to 8 bits, and of an animation the first frame is taken. Colour profiles are ignored.

    Args:
        source: a path; a data: URL in base64; the bytes of a file, or a file open for reading
            bytes; an image of Pillow; or an array, [y x] grey, [y x 3] RGB or [y x 4] RGBA, of
            uint8 or uint16.
        name: what to call it in errors; by default its path or its kind.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is an address, no image, damaged, of a kind that is not read, or has more
            pixels than Pillow's `Image.MAX_IMAGE_PIXELS` (89 million unless set), as small files
            can that are made to fill the memory.
    """
    name = title(source) if name is None else name
    if isinstance(source, np.ndarray):
        return _rgb(_from_array(source, name), name)
    if isinstance(source, Image.Image):
        return _loaded(source, name)
    if isinstance(source, str) and (url := _DATA.match(source)):
        source = _decoded(source[url.end() :], url, name)
    if isinstance(source, str) and (address := _ADDRESS.match(source)):
        raise ValueError(
            f"{name}: nothing is downloaded from {address[1]}:// addresses; give the path of a "
            f"file, or its content as a data: URL"
        )
    if isinstance(source, bytes | bytearray | memoryview):
        source = io.BytesIO(source)
    readable = hasattr(source, "read") and not isinstance(source, io.TextIOBase)
    if not isinstance(source, str | os.PathLike) and not readable:
        raise ValueError(
            f"{name} is no image: use a path, a data: URL, bytes, a file opened with 'rb', an "
            f"array or an image of Pillow"
        )
    with _opened(source, name) as image:
        return _loaded(image, name)


def title(source: Any) -> str:
    """What errors call an image: its path, or what it is given as."""
    if isinstance(source, str):
        return "a data: URL" if _DATA.match(source) else source
    if isinstance(source, os.PathLike):
        return os.fspath(source)
    called = getattr(source, "name", None) or getattr(source, "filename", None)
    given = f"an image given as {type(source).__name__}"
    return called if isinstance(called, str) and called else given


def _decoded(text: str, url: re.Match[str], name: str) -> bytes:
    if not url["base64"]:
        raise ValueError(f"{name} is not in base64: write data:image/png;base64, and the content")
    try:
        return base64.b64decode(re.sub(r"\s+", "", text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} is not valid base64 ({error})") from None


def _opened(source: Any, name: str) -> ImageFile.ImageFile:
    """The image in a file, of which only the header is read so far."""
    Image.init()
    known = [kind for kind in FORMATS if kind in Image.OPEN]
    try:
        # Pillow refuses twice the limit; between the two it warns.
        with _FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on small faults of a file
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(source, formats=known)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such file") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        most = Image.MAX_IMAGE_PIXELS
        raise ValueError(f"{name} has more than {most:,} pixels; make it smaller first") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name} is no image of a kind that is read; {_WANTED}") from None
    except Exception as error:  # a damaged header can make a decoder raise anything
        if isinstance(error, OSError) and error.strerror:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from None
        raise _damaged(name, error) from None


def _loaded(image: Image.Image, name: str) -> Image.Image:
    """An open image with its pixels read, upright, in RGB."""
    try:
        image.load()
    except Exception as error:  # as for a header
        raise _damaged(name, error) from None
    turn = _UPRIGHT.get(_orientation(image))
    plain = _rgb(image, name)
    return plain if turn is None else plain.transpose(turn)


def _damaged(name: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{name} is damaged or incomplete: {reason}")


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # what a camera or an editor wrote wrongly leaves the image readable
        return None


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """Any mode of Pillow as RGB."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):
        # Pillow's own conversion cuts everything above 255 off.
        image = Image.fromarray(_eight_bits(np.asarray(image), name))
    if image.mode == "F":
        raise ValueError(f"{name} has floating-point pixels; save it with 8 or 16 bits a channel")
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        clear = image.convert("RGBA")
    except ValueError:
        raise ValueError(f"{name} has pixels of kind {image.mode}; save it in RGB") from None
    # As Meta's chat format does it, which has its rounding.
    white = Image.new("RGB", clear.size, (255, 255, 255))
    white.paste(clear, mask=clear.getchannel("A"))
    return white


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    shape, kind = array.shape, array.dtype
    plain = array.ndim == 2 or (array.ndim == 3 and shape[2] in (3, 4))
    if not plain or 0 in shape:
        raise ValueError(
            f"{name} has shape {shape}; use [height, width], [height, width, 3] for RGB or "
            f"[height, width, 4] for RGBA"
        )
    if kind not in (np.uint8, np.uint16):
        raise ValueError(f"{name} has values of {kind}; use uint8 or uint16")
    return Image.fromarray(np.ascontiguousarray(array if kind == np.uint8 else _eight_bits(array)))


def _eight_bits(array: np.ndarray, name: str = "") -> np.ndarray:
    """uint8 of values from 0 to 65535, rounded, so that white stays white."""
    if array.min() < 0 or array.max() > 65_535:
        most = array.max()
        raise ValueError(f"{name} has grey values up to {most}; 65535, 16 bits, is the most read")
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
