"""Image files through Pillow: read right, or refused with the file's name; never clipped, cut or turned in silence.

What Pillow does not do by itself: 16-bit colours come out of it with 8 bits, colours below full transparency show, the
orientation in the EXIF of all formats but TIFF is ignored, and large images are taken for attacks.
"""

import importlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ats.sources.errors import ImageFileError as ImageFileError
from ats.sources.other_reader import advice_for
from ats.sources.stored_depth import Stored, png_has_late_text, stored_depth

if TYPE_CHECKING:
    from PIL.Image import Image

WHITE = 255
Colour = int | float | Sequence[int] | Sequence[float]

_ORIENTATION = 0x0112  # EXIF's tag
_TURNED = (5, 6, 7, 8)  # orientations that exchange height and width
_GREY = ("1", "L")
_COLOUR = ("RGB", "RGBX", "P", "CMYK", "YCbCr", "HSV")
_ALPHA = {"LA": "LA", "La": "LA", "RGBA": "RGBA", "RGBa": "RGBA", "PA": "RGBA"}


@dataclass(frozen=True)
class Header:
    """What is known of an image file before it is decoded.

    Attributes:
        height, width: pixels, the right way up.
        channels: of what `decode` returns.
        dtype: of what `decode` returns: uint8, uint16, int16 or float32.
        mode: Pillow's, for messages.
    """

    height: int
    width: int
    channels: int
    dtype: np.dtype[Any]
    mode: str


def needed(module: str, package: str, extra: str, what: str) -> ModuleType:
    """Import a module that an extra of torch-ats brings.

    Raises:
        ModuleNotFoundError: its package is not installed; says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{package} is not installed; {what} need it: pip install 'torch-ats[{extra}]'", name=error.name
        ) from error


def pillow(module: str) -> ModuleType:
    """A module of Pillow's, e.g. "Image"; raises as `needed`."""
    return needed(f"PIL.{module}", "Pillow", "data", "image files")


def read_header(path: Path, *, keep_alpha: bool = False) -> Header:
    """Size and kind of an image file, without decoding it.

    Args:
        path: the file.
        keep_alpha: count transparency as a channel, in place of laying the image on a background.

    Raises:
        FileNotFoundError: there is no such file.
        ImageFileError: damaged, cut short, no image, or one that cannot be read without loss.
    """
    with _open(path) as image:
        return _header(path, image, keep_alpha)


def decode(path: Path, background: Colour | None = WHITE) -> np.ndarray[Any, np.dtype[Any]]:
    """Pixels (H, W, C) of an image file, the right way up: grey, colours, or these with transparency.

    Args:
        path: the file.
        background: colour behind transparent pixels, one number or one a channel. None: keep transparency as the last
            channel.

    Raises:
        FileNotFoundError: there is no such file.
        ImageFileError: as `read_header`, or larger than this machine's memory.
    """
    with _open(path) as image:
        header = _header(path, image, background is None)
        _check_memory(path, header)
        image.load()
        pixels = _to_array(_upright(image), header)
    if pixels.shape[-1] > header.channels:
        pixels = composite(pixels, background_colour(background, header.channels, str(path)))
    return np.ascontiguousarray(pixels)


def chosen_background(background: Colour | str | None, own: Colour = WHITE) -> Colour | None:
    """What to lay an image on: `own` for "auto", None for nothing."""
    if background is None or isinstance(background, (int, float)):
        return background
    if isinstance(background, str):
        return own
    try:
        number = getattr(background, "ndim", 1) == 0  # an array, or a tensor, of one
        return float(background) if number else tuple(map(float, background))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"background must be 'auto', None, a number from 0 to 255 or one a channel; got {background!r}"
        ) from error


def background_colour(background: Colour | None, channels: int, name: str) -> np.ndarray[Any, np.dtype[Any]]:
    """A colour of (channels,) float64 from one number or one a channel.

    Raises:
        ValueError: another number of values, or a value that is none of 0 to 255.
    """
    try:
        colour = np.asarray(background, np.float64)
    except (TypeError, ValueError):
        colour = np.full(0, np.nan)
    if colour.shape not in ((), (channels,)) or not ((colour >= 0) & (colour <= 255)).all():
        raise ValueError(
            f"background must be a number from 0 to 255, or one for each of the {channels} channels of {name}; "
            f"got {background!r}"
        )
    return np.broadcast_to(colour, channels)


def composite(
    pixels: np.ndarray[Any, np.dtype[Any]], background: np.ndarray[Any, np.dtype[Any]]
) -> np.ndarray[Any, np.dtype[Any]]:
    """Lay pixels (H, W, C + 1) uint8 with alpha last on a background (C,): (H, W, C) uint8, rounded to the nearest.

    Of opaque pixels it is a window into them.
    """
    colours, alpha = pixels[..., :-1], pixels[..., -1:]
    if (alpha == 255).all():
        return colours
    # In integers: colours come back to the very byte where alpha is full, the background where it is none.
    weighted = colours.astype(np.uint32) * alpha + np.round(background).astype(np.uint32) * (
        255 - alpha.astype(np.uint32)
    )
    return ((weighted + 127) // 255).astype(np.uint8)


_LIMIT_LOCK = threading.Lock()
_without_limit = 0
_limit: Any = None


@contextmanager
def _no_pixel_limit() -> Iterator[None]:
    """Let Pillow read large images: its limit is one variable of the process, put back when the last reader is done."""
    global _without_limit, _limit
    image: Any = pillow("Image")
    with _LIMIT_LOCK:
        if not _without_limit:
            _limit, image.MAX_IMAGE_PIXELS = image.MAX_IMAGE_PIXELS, None
        _without_limit += 1
    try:
        yield
    finally:
        with _LIMIT_LOCK:
            _without_limit -= 1
            if not _without_limit:
                image.MAX_IMAGE_PIXELS = _limit


@contextmanager
def _open(path: Path) -> Iterator["Image"]:
    """An open file; whatever Pillow raises about it becomes one error that names it."""
    module = pillow("Image")
    try:
        with _no_pixel_limit(), module.open(path) as image:
            yield image
    except ImageFileError:
        raise
    except MemoryError as error:
        raise ImageFileError(f"{path} is too large for the memory that is free; {_TILED}") from error
    except OSError as error:
        if (
            error.filename is not None
        ):  # the system's word, e.g. that the file is missing or not to be read by this user
            raise
        raise _unreadable(path, error) from error
    except Exception as error:  # its decoders let out whatever damaged bytes lead to, of a dozen types
        raise _unreadable(path, error) from error


_TILED = "store it as a tiled TIFF, of which parts can be read, and use ats.open_image"


def _unreadable(path: Path, error: Exception) -> ImageFileError:
    text = str(error) or type(error).__name__
    mend = "put a whole copy in its place"
    if isinstance(error, pillow("Image").UnidentifiedImageError):
        text = "of no kind that Pillow knows"
        mend += f"; if it is whole, {advice_for(path)}"
    return ImageFileError(f"{path} is damaged, cut short or no image ({text}); {mend}")


def _check_memory(path: Path, header: Header) -> None:
    size = header.height * header.width * (header.channels + 1) * header.dtype.itemsize
    if size > memory_size():
        raise ImageFileError(
            f"{path} of {header.height}×{header.width} pixels would take {size / 2**30:.0f} GiB decoded, more "
            f"than this machine's memory; {_TILED}"
        )


def memory_size() -> int:
    """Bytes of this machine's memory; without bound where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62


def _header(path: Path, image: "Image", keep_alpha: bool) -> Header:
    height, width = image.height, image.width
    if height != width and _orientation(image) in _TURNED:
        height, width = width, height
    stored = stored_depth(path, image)
    transparent = image.mode in _ALPHA or "transparency" in image.info
    if image.mode in _GREY or image.mode in _COLOUR or image.mode in _ALPHA:
        if stored.bits > 8 or stored.signed:
            raise _refusal(path, image, f"{stored}, of which Pillow gives 8 unsigned bits")
        channels = 1 if image.mode in (*_GREY, "LA", "La") else 3
        # A grey image whose transparency is one of its values is grey.
        return Header(height, width, channels + (transparent and keep_alpha), np.dtype(np.uint8), image.mode)
    dtype = _deep_dtype(image.mode, stored)
    if dtype is None:
        raise _refusal(path, image, f"{stored}, which cannot be read without loss")
    if transparent:
        raise _refusal(path, image, f"{stored} and a transparent value, which is not supported")
    return Header(height, width, 1, dtype, image.mode)


def _deep_dtype(mode: str, stored: Stored) -> np.dtype[Any] | None:
    """The dtype of images of one deep channel; None where torch or Pillow has no such numbers."""
    if stored.inverted:
        return None
    if mode.startswith("I;16") and not stored.signed:
        return np.dtype(np.uint16)
    if mode == "I" and stored.bits <= 16:
        return np.dtype(np.int16 if stored.signed else np.uint16)
    if mode == "F" and stored.bits <= 32:
        return np.dtype(np.float32)
    return None


def _refusal(path: Path, image: "Image", what: str) -> ImageFileError:
    return ImageFileError(f"{path} of mode {image.mode} holds {what}; {advice_for(path)}, or convert it to 8 bits")


def _orientation(image: "Image") -> int:
    """EXIF's, 1 to 8, without decoding the image for it; 1 where there is none, or Pillow itself applies it."""
    if image.format == "TIFF":
        return 1
    if image.format == "PNG" and png_has_late_text(image):
        image.load()  # it is written behind the pixels
    try:
        # Not PngImageFile's own, which decodes the image in search of it.
        return int(pillow("Image").Image.getexif(image).get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF names no orientation; the pixels are well
        return 1


def _upright(image: "Image") -> "Image":
    turns = pillow("Image").Transpose
    method = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _to_array(image: "Image", header: Header) -> np.ndarray[Any, np.dtype[Any]]:
    """(H, W, C) or, where there is transparency, (H, W, C + 1) with alpha last."""
    if header.dtype != np.uint8:
        return np.asarray(image).astype(header.dtype)[..., None]
    if image.mode in _ALPHA or "transparency" in image.info:
        grey = image.mode in (*_GREY, "LA", "La")
        straight = image if image.mode not in ("La", "RGBa") else image.convert(_ALPHA[image.mode])
        pixels = np.asarray(straight.convert("RGBA"))
        return pixels[..., [0, 3]] if grey else pixels
    pixels = np.array(image.convert("L" if image.mode in _GREY else "RGB"))
    return pixels[..., None] if pixels.ndim == 2 else pixels
