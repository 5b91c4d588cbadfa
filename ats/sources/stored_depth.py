"""How many bits an image file stores a channel, which Pillow's mode does not always say: 16-bit colours are "RGB"."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from PIL.Image import Image

_PNG_CHUNK = struct.Struct(">I4s")
_PNG_TEXT = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")


@dataclass(frozen=True)
class Stored:
    """What a file stores a channel.

    Attributes:
        bits: of one value.
        signed: whether below 0 counts.
        inverted: whether 0 is white in an image deeper than 8 bits, where Pillow does not turn it round.
    """

    bits: int
    signed: bool = False
    inverted: bool = False

    def __str__(self) -> str:
        return f"{self.bits} {'signed ' if self.signed else ''}bits a channel{', 0 for white' if self.inverted else ''}"


def stored_depth(path: Path, image: "Image") -> Stored:
    """Read the depth that the file itself names, from a header; what Pillow's mode says where it names none."""
    by_mode = Stored(32 if image.mode in ("I", "F") else 16 if image.mode.startswith("I;16") else 8)
    if image.format == "TIFF":
        return _tiff(image)
    with path.open("rb") as file:
        start = file.read(4096)
    if image.format == "PNG":
        return Stored(start[24])
    if image.format == "PPM" and start[:2] not in (b"Pf", b"PF"):
        return _netpbm(start, by_mode)
    if image.format == "SGI":
        return Stored(8 * start[3])
    if image.format == "JPEG2000":
        return _jpeg2000(start, by_mode)
    if image.format == "AVIF":
        place = start.find(b"av1C")
        deep = 0 <= place < len(start) - 6 and start[place + 6] & 0x40
        return Stored(12 if deep and start[place + 6] & 0x20 else 10 if deep else 8)
    return by_mode


def png_has_late_text(image: "Image") -> bool:
    """Whether a PNG has metadata behind its pixels, found by stepping from chunk to chunk."""
    file: BinaryIO | None = getattr(image, "fp", None)
    if file is None:  # decoded: what is behind is known by now
        return False
    place, pixels = file.tell(), False
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = _PNG_CHUNK.unpack(head)
            if kind == b"IEND":
                break
            pixels = pixels or kind == b"IDAT"
            if pixels and kind in _PNG_TEXT:
                return True
            file.seek(length + 4, 1)
        return False
    finally:
        file.seek(place)


def _tiff(image: "Image") -> Stored:
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits = max(_numbers(tags.get(258, 1)))
    signed = 2 in _numbers(tags.get(339, 1))
    return Stored(bits, signed, inverted=bits > 8 and tags.get(262) == 0)


def _numbers(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _netpbm(start: bytes, by_mode: Stored) -> Stored:
    """The largest value is the third number of the header (the fourth of a PAM's, by name)."""
    lines = [line.split(b"#")[0] for line in start.split(b"\n")]
    words = b" ".join(lines).split()
    if words[0] == b"P7":
        largest = words[words.index(b"MAXVAL") + 1] if b"MAXVAL" in words else b"255"
    elif words[0] in (b"P1", b"P4"):
        return Stored(1)
    else:
        largest = words[3] if len(words) > 3 else b""
    return Stored(max(8, int(largest).bit_length())) if largest.isdigit() else by_mode


def _jpeg2000(start: bytes, by_mode: Stored) -> Stored:
    """The marker SIZ begins the codestream; a byte a component, at its end, is the depth less one and the sign."""
    place = start.find(b"\xff\x4f\xff\x51")
    if not 0 <= place < len(start) - 43:
        return by_mode
    (components,) = struct.unpack_from(">H", start, place + 40)
    depths = start[place + 42 : place + 42 + 3 * components : 3]
    return Stored(max((depth & 0x7F) + 1 for depth in depths), signed=any(depth & 0x80 for depth in depths))
