"""What kind of TIFF a file is, from its first directory: which reader it is for does not depend on those installed."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _SAMPLES, _TILE_WIDTH, _FORMAT = 256, 257, 258, 262, 277, 322, 339
_STORED = ((273, 279), (324, 325))  # where strips, and tiles, begin, and how many bytes they have
_SUB_DIRECTORIES = 330
_HAMAMATSU = 65420  # NDPI, whose directories have numbers of 64 bits where TIFF has 32
_GEOGRAPHIC = (33550, 33922, 34264, 34735)  # GeoTIFF's scale, tie points, transformation and keys
_TYPES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_MOST_ENTRIES = 4096
_MOST_DIRECTORIES = 1024
_DAMAGED = (struct.error, ValueError, KeyError, OverflowError)


@dataclass(frozen=True)
class TiffHeader:
    """What the header says of the first image of a TIFF.

    Attributes:
        height, width: pixels.
        bits: of a channel, the deepest.
        samples: channels.
        photometric: 0 and 1 grey, 2 red, green, blue, 3 palette, 5 CMYK, 6 YCbCr.
        unsigned: whether all channels hold unsigned integers.
        tiled: in tiles, not strips.
        geographic: it lies somewhere on Earth.
        more: other images follow.
    """

    height: int
    width: int
    bits: int
    samples: int
    photometric: int
    unsigned: bool
    tiled: bool
    geographic: bool
    more: bool


def read_tiff_header(path: Path) -> TiffHeader | None:
    """The header of a TIFF or BigTIFF; None where the file is neither, or is damaged.

    Raises:
        OSError: the file is missing or may not be read.
    """
    with path.open("rb") as file:
        try:
            return _read(file)
        except _DAMAGED:
            return None


def stored_until(path: Path) -> int | None:
    """The byte before which a TIFF says that all its pixels are; None where the file is none, or does not say.

    All directories are looked at, and no pixel.

    Raises:
        OSError: the file is missing or may not be read.
    """
    with path.open("rb") as file:
        try:
            layout = _layout(file)
        except _DAMAGED:
            return None
        if layout is None:
            return None
        end, wanted, seen = 0, [layout.first], set[int]()
        while wanted and len(seen) < _MOST_DIRECTORIES:
            place = wanted.pop()
            if not place or place in seen:
                continue
            seen.add(place)
            try:
                directory = _directory(file, layout, place)
                if _HAMAMATSU in directory.tags:
                    return None
                for begins, sizes in _STORED:
                    if begins in directory.tags and sizes in directory.tags:
                        both = zip(_values(file, directory, begins), _values(file, directory, sizes), strict=False)
                        end = max(end, *(begin + size for begin, size in both if size), 0)
                if _SUB_DIRECTORIES in directory.tags:
                    wanted += _values(file, directory, _SUB_DIRECTORIES)
                wanted.append(directory.following)
            except _DAMAGED:  # opening it says so, where it matters
                continue
        return end or None


class _Layout(NamedTuple):
    """How numbers are stored: their order, and the types of counts and places; and where the first directory is."""

    order: str
    counts: str
    place: str
    first: int


class _Directory(NamedTuple):
    layout: _Layout
    tags: dict[int, tuple[int, int, bytes]]
    following: int


def _layout(file: BinaryIO) -> _Layout | None:
    start = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    if order is None:
        return None
    (version,) = struct.unpack(f"{order}H", start[2:4])
    if version == 42:
        return _Layout(order, "H", "I", struct.unpack(f"{order}I", start[4:8])[0])
    if version == 43:
        return _Layout(order, "Q", "Q", struct.unpack(f"{order}Q", start[8:16])[0])
    return None


def _directory(file: BinaryIO, layout: _Layout, place: int) -> _Directory:
    file.seek(place)
    (count,) = _unpack(file, layout.order + layout.counts)
    if count > _MOST_ENTRIES:
        raise ValueError(f"{count} entries")
    entry = struct.Struct(f"{layout.order}HH{layout.place}{struct.calcsize(layout.place)}s")
    entries = [entry.unpack(file.read(entry.size)) for _ in range(count)]
    (following,) = _unpack(file, layout.order + layout.place)
    return _Directory(layout, {tag: (kind, number, value) for tag, kind, number, value in entries}, following)


def _values(file: BinaryIO, directory: _Directory, tag: int, most: int | None = None) -> tuple[int, ...]:
    layout, (kind, number, value) = directory.layout, directory.tags[tag]
    wanted = f"{layout.order}{number if most is None else min(number, most)}{_TYPES[kind]}"
    if struct.calcsize(f"{layout.order}{number}{_TYPES[kind]}") > len(value):
        file.seek(struct.unpack(layout.order + layout.place, value)[0])
        return _unpack(file, wanted)
    return struct.unpack_from(wanted, value)


def _read(file: BinaryIO) -> TiffHeader | None:
    layout = _layout(file)
    if layout is None:
        return None
    directory = _directory(file, layout, layout.first)
    tags = directory.tags

    def values(tag: int, default: int) -> tuple[int, ...]:
        return _values(file, directory, tag, 64) if tag in tags else (default,)

    return TiffHeader(
        height=values(_HEIGHT, 0)[0],
        width=values(_WIDTH, 0)[0],
        bits=max(values(_BITS, 1)),
        samples=values(_SAMPLES, 1)[0],
        photometric=values(_PHOTOMETRIC, 1)[0],
        unsigned=set(values(_FORMAT, 1)) <= {1, 4},
        tiled=_TILE_WIDTH in tags,
        geographic=any(tag in tags for tag in _GEOGRAPHIC),
        more=directory.following != 0,
    )


def _unpack(file: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))
