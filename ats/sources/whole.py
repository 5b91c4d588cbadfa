"""Whether an image file is whole, as far as that shows without decoding it: before a training, not in its midst."""

import os
from pathlib import Path

from ats.sources.decoding import ImageFileError, decode
from ats.sources.tiff_header import stored_until

_ENDS = {b"\x89PNG": b"IEND", b"\xff\xd8\xff": b"\xff\xd9"}  # of PNG and JPEG, which such files have near their end
_TAIL = 4096


def check_whole(path: Path) -> None:
    """Raise where a file lacks its end. Little of it is read, and it is decoded only where its end looks wrong.

    A TIFF, as most slides and rasters are, says where its pixels are; a PNG or JPEG ends with a mark. Of other files
    nothing is known.

    Raises:
        ValueError: it is cut short.
        OSError: it is missing or may not be read.
    """
    until, size = stored_until(path), os.stat(path).st_size
    if until is not None and until > size:
        raise ImageFileError(
            f"{path} is cut short: it has {size:,} bytes, and says that pixels are stored up to byte {until:,}; put a "
            "whole copy in its place"
        )
    with path.open("rb") as file:
        start = file.read(4)
        mark = next((end for begin, end in _ENDS.items() if start.startswith(begin)), None)
        if mark is None:
            return
        file.seek(max(0, size - _TAIL))
        ends = mark in file.read()
    if not ends:  # or more of something else follows
        decode(path)
