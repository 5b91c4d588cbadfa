"""Whole slide images through OpenSlide (extra `slides`): Aperio, Hamamatsu, Leica, Mirax, Philips, DICOM and others."""

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ats.sources.decoding import WHITE, Colour, ImageFileError, background_colour, chosen_background, composite, needed
from ats.sources.file_source import FileSource
from ats.sources.image_source import Level, check_mpp, file_fingerprint
from ats.sources.other_reader import advice_for
from ats.sources.tiff_header import read_tiff_header

Pixels = np.ndarray[Any, np.dtype[Any]]

_AT_ONCE = 4096
"""Pixels a side that OpenSlide reads in one piece; larger reads it places piece by piece, at whole level-0 pixels."""


_PIXELS_AT_ONCE = 1 << 22
_CACHE_BYTES = 32 << 20
"""Decoded tiles that a process keeps."""

_lock = threading.Lock()
_caches: dict[int, Any] = {}


@dataclass(frozen=True)
class SlideSource(FileSource):
    """A slide of red, green and blue bytes, with transparency as a fourth channel where it has no background.

    Attributes:
        numbers: OpenSlide's number of each level.
        steps: level-0 pixels to a level's pixel where they are whole; None: the level is read from its corner.
        bounds: (top, left, height, width) of what was scanned, in level-0 pixels, where the file says so. QuPath's
            coordinates begin there for some formats.
    """

    numbers: tuple[int, ...]
    steps: tuple[int | None, ...]
    bounds: tuple[int, int, int, int] | None

    def _open_handle(self) -> Any:
        return _open(self.path)

    def _read(self, opened: Any, level: int, top: int, left: int, height: int, width: int) -> Tensor:
        step, number = self.steps[level], self.numbers[level]
        box = np.empty((self.channels, height, width), np.uint8)
        if step is None:  # OpenSlide takes level-0 pixels, which would be resampled at fractions of this level's
            box[:] = self._pixels(opened, (0, 0), number, (left + width, top + height))[:, top:, left:]
            return torch.from_numpy(box)
        rows = max(1, _PIXELS_AT_ONCE // width)  # what Pillow and NumPy make of a part is gone before the next
        for first in range(0, height, rows):
            last = min(first + rows, height)
            place = left * step, (top + first) * step
            box[:, first:last] = self._pixels(opened, place, number, (width, last - first))
        return torch.from_numpy(box)

    def _pixels(self, opened: Any, place: tuple[int, int], number: int, size: tuple[int, int]) -> Pixels:
        """(C, h, w) at (x, y) of level 0, for a size (w, h)."""
        pixels = np.asarray(opened.read_region(place, number, size))
        if self.background is not None:
            pixels = composite(pixels, background_colour(self.background, 3, self.name))
        return pixels.transpose(2, 0, 1)


def open_slide(path: Path, *, mpp: tuple[float, float] | None, background: Colour | str | None) -> SlideSource:
    """A slide. Levels that OpenSlide cannot read without resampling are left out.

    Those are levels of more than 4096 pixels a side whose downsample is no whole number.

    Args:
        path: of its file, or of one of its files.
        mpp: in place of what the file says.
        background: "auto" is the slide's own colour, white where it names none.

    Raises:
        ModuleNotFoundError: OpenSlide is not installed.
        ValueError: damaged, no slide, or deeper than 8 bits a channel, which OpenSlide would cut.
    """
    header = read_tiff_header(path)
    if header is not None and header.bits > 8:
        raise ImageFileError(
            f"{path} holds {header.bits} bits a channel, of which OpenSlide gives 8; {advice_for(path)}"
        )
    fingerprint = file_fingerprint(path)
    slide = _open(path)
    try:
        properties = dict(slide.properties)
        sizes, downsamples = slide.level_dimensions, slide.level_downsamples
    finally:
        slide.close()
    levels: list[Level] = []
    numbers: list[int] = []
    steps: list[int | None] = []
    for number, ((width, height), downsample) in enumerate(zip(sizes, downsamples, strict=True)):
        step = round(downsample) if downsample == round(downsample) else None
        smaller = not levels or (height < levels[-1].height and width < levels[-1].width)  # else a mask, or a copy
        if smaller and (step is not None or max(height, width) <= _AT_ONCE):
            levels.append(Level(height, width))
            numbers.append(number)
            steps.append(step)
    behind = chosen_background(background, _named_colour(properties.get("openslide.background-color")))
    if behind is not None:
        background_colour(behind, 3, str(path))
    return SlideSource(
        path=path,
        background=behind,
        levels=tuple(levels),
        channels=4 if behind is None else 3,
        dtype=torch.uint8,
        mpp=mpp or _named_mpp(properties),
        fingerprint=fingerprint,
        numbers=tuple(numbers),
        steps=tuple(steps),
        bounds=_named_bounds(properties),
    )


def is_slide(path: Path) -> bool:
    """Whether OpenSlide, which must be installed, takes a file for a slide."""
    openslide = _openslide()
    try:
        return bool(openslide.OpenSlide.detect_format(str(path)))
    except openslide.OpenSlideError:
        return True  # a slide that is damaged, which opening it will say


def _openslide() -> Any:
    return needed("openslide", "openslide-python", "slides", "slides")


def _cache(openslide: Any) -> Any:
    """One cache for all slides and threads of a process; by itself OpenSlide has one of 32 MB for each handle."""
    process = os.getpid()
    with _lock:
        if process not in _caches:  # a parent's is kept, and left alone
            _caches[process] = openslide.OpenSlideCache(_CACHE_BYTES)
        return _caches[process]


def _open(path: Path) -> Any:
    openslide = _openslide()
    try:
        slide = openslide.OpenSlide(str(path))
        slide.set_cache(_cache(openslide))
        return slide
    except Exception as error:
        text = str(error) or "no slide that OpenSlide knows"
        raise ImageFileError(
            f"{path} is damaged, cut short or no slide ({text}{_looks_like(path)}); put a whole copy in its place, or "
            "name another reader with backend='pillow' or 'rasterio'"
        ) from error


_BEGINNINGS = {
    b"\x89PNG": "a PNG",
    b"\xff\xd8\xff": "a JPEG",
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"PK\3\4": "a ZIP archive",
    b"%PDF": "a PDF",
    b"<": "a text of markup",
}


def _looks_like(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(8)
    return next((f"; it begins as {kind} does" for sign, kind in _BEGINNINGS.items() if start.startswith(sign)), "")


def _named_colour(text: str | None) -> Colour:
    try:
        return tuple(bytes.fromhex(text or "")) if text and len(text) == 6 else WHITE
    except ValueError:
        return WHITE


def _named_mpp(properties: dict[str, str]) -> tuple[float, float] | None:
    try:
        return check_mpp((float(properties["openslide.mpp-y"]), float(properties["openslide.mpp-x"])))
    except (KeyError, ValueError):
        return None


def _named_bounds(properties: dict[str, str]) -> tuple[int, int, int, int] | None:
    try:
        top, left, height, width = (
            int(properties[f"openslide.bounds-{side}"]) for side in ("y", "x", "height", "width")
        )
    except (KeyError, ValueError):
        return None
    return top, left, height, width


def _in_child() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
