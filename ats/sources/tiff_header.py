"""What kind of TIFF a file is, from its first directory: which reader it is for does not depend on those installed."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _SAMPLES, _TILE_WIDTH, _FORMAT = 256, 257, 258, 262, 277, 322, 339
_GEOGRAPHIC = (33550, 33922, 34264, 34735)  # GeoTIFF's scale, tie points, transformation and keys
_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}
_MOST_ENTRIES = 4096


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
        except (struct.error, ValueError, KeyError, OverflowError):
            return None


def _read(file: BinaryIO) -> TiffHeader | None:
    start = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    if order is None:
        return None
    (version,) = struct.unpack(f"{order}H", start[2:4])
    if version == 42:
        offset, count_type, value_type = struct.unpack(f"{order}I", start[4:8])[0], "H", "I"
    elif version == 43:
        offset, count_type, value_type = struct.unpack(f"{order}Q", start[8:16])[0], "Q", "Q"
    else:
        return None
    file.seek(offset)
    (count,) = _unpack(file, order + count_type)
    if count > _MOST_ENTRIES:
        return None
    entry = struct.Struct(f"{order}HH{value_type}{struct.calcsize(value_type)}s")
    entries = [entry.unpack(file.read(entry.size)) for _ in range(count)]
    (following,) = _unpack(file, order + value_type)
    tags = {tag: (kind, number, value) for tag, kind, number, value in entries}

    def values(tag: int, default: int) -> tuple[int, ...]:
        if tag not in tags:
            return (default,)
        kind, number, value = tags[tag]
        layout = f"{order}{min(number, 64)}{_TYPES[kind]}"
        if struct.calcsize(f"{order}{number}{_TYPES[kind]}") > len(value):
            file.seek(struct.unpack(order + value_type, value)[0])
            return _unpack(file, layout)
        return struct.unpack_from(layout, value)

    return TiffHeader(
        height=values(_HEIGHT, 0)[0],
        width=values(_WIDTH, 0)[0],
        bits=max(values(_BITS, 1)),
        samples=values(_SAMPLES, 1)[0],
        photometric=values(_PHOTOMETRIC, 1)[0],
        unsigned=set(values(_FORMAT, 1)) <= {1, 4},
        tiled=_TILE_WIDTH in tags,
        geographic=any(tag in tags for tag in _GEOGRAPHIC),
        more=following != 0,
    )


def _unpack(file: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))
