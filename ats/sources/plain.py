"""Image files through Pillow (extra `data`). They are decoded whole; a process keeps those it used last."""

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ats.sources.decoding import Colour, background_colour, chosen_background, decode, read_header
from ats.sources.file_source import FileSource
from ats.sources.image_source import Level, check_box, check_unchanged, file_fingerprint

KEPT_BYTES = 256 << 20
"""Decoded images that a process keeps, the last one whatever its size."""

Array = np.ndarray[Any, np.dtype[Any]]


class _Decoded:
    """One image, decoded once by the first thread that wants it."""

    def __init__(self, pixels: Array | None = None) -> None:
        self.lock, self.pixels = threading.Lock(), pixels


_lock = threading.Lock()
_decoded: OrderedDict[tuple[str, Any], _Decoded] = OrderedDict()


@dataclass(frozen=True)
class PlainSource(FileSource):
    """An image file: PNG, JPEG, TIFF and what else Pillow reads, upright, on its background."""

    def read(self, level: int, top: int, left: int, height: int, width: int) -> Tensor:
        """See `ats.sources.ImageSource`."""
        _, top, left, height, width = check_box(self, level, top, left, height, width)
        box = self._pixels()[top : top + height, left : left + width]
        return torch.from_numpy(np.ascontiguousarray(box.transpose(2, 0, 1)))

    def _pixels(self) -> Array:
        """(H, W, C), shared by all threads."""
        key = (self.fingerprint, self.background)
        with _lock:
            entry = _decoded.setdefault(key, _Decoded())
            _decoded.move_to_end(key)
        with entry.lock:
            if entry.pixels is None:
                try:
                    check_unchanged(self.path, self.fingerprint)
                    entry.pixels = decode(self.path, self.background)
                except BaseException:
                    with _lock:
                        _decoded.pop(key, None)
                    raise
                _evict()
            return entry.pixels


def open_plain(path: Path, *, mpp: tuple[float, float] | None, background: Colour | str | None) -> PlainSource:
    """An image file.

    Args:
        path: of it.
        mpp: micrometres a pixel; what the file says of dots an inch is of printing, and not looked at.
        background: behind transparent pixels; "auto" is white.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: damaged, no image, or one that Pillow cannot read without loss.
    """
    behind = chosen_background(background)
    fingerprint = file_fingerprint(path)
    header = read_header(path, keep_alpha=behind is None)
    if behind is not None:
        background_colour(behind, header.channels, str(path))
    return PlainSource(
        path=path,
        background=behind,
        levels=(Level(header.height, header.width),),
        channels=header.channels,
        dtype=torch.from_numpy(np.empty(0, header.dtype)).dtype,
        mpp=mpp,
        fingerprint=fingerprint,
    )


def _evict() -> None:
    with _lock:
        kept = sum(entry.pixels.nbytes for entry in _decoded.values() if entry.pixels is not None)
        for key in list(_decoded)[:-1]:
            pixels = _decoded[key].pixels
            if kept > KEPT_BYTES and pixels is not None:
                del _decoded[key]
                kept -= pixels.nbytes


def _in_child() -> None:
    """Locks that other threads held stay closed in a child; the pixels are its own to read."""
    global _lock
    _lock = threading.Lock()
    for key, entry in list(_decoded.items()):
        _decoded[key] = _Decoded(entry.pixels)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
