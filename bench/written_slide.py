"""A slide of any size, written tile by tile: memory does not grow with it.

It is a pyramid in tiles, of JPEG at 4:2:0 as scanners write them or deflated, that OpenSlide opens.
"""

import functools
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

TILE = 256
RATIO = 4  # of the sides of a level to the next
KINDS = 32  # tiles of which the full resolution is made
_JPEG, _YCBCR = 7, 6  # TIFF's numbers
LEAST = 1024  # pixels: no level follows one that is smaller


def write_slide(path: Path, height: int, width: int, compression: Literal["jpeg", "deflate"] = "jpeg") -> None:
    """Write a slide of level 0 in (height, width) pixels; whole, or not at all.

    The full resolution is made of a few kinds of tiles, laid at random and encoded once each. What follows is the mean
    of it. Its right and lower edges amid tiles are as libraries write them: whole tiles, of which the rest is unseen.
    """
    import tifffile

    sizes = [(height, width)]
    while min(sizes[-1]) > LEAST:
        sizes.append((sizes[-1][0] // RATIO, sizes[-1][1] // RATIO))
    which = np.random.default_rng(0).integers(0, KINDS, (-(-height // TILE), -(-width // TILE)))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with tifffile.TiffWriter(part, bigtiff=True) as file:
            for level, size in enumerate(sizes):
                file.write(
                    _tiles(which, size, RATIO**level, compression),
                    shape=(*size, 3),
                    dtype=np.uint8,
                    tile=(TILE, TILE),
                    photometric="rgb",
                    compression="deflate",  # bytes are written as they are; tifffile encodes no JPEG by itself
                    subfiletype=int(level > 0),
                    metadata=None,
                )
        if compression == "jpeg":
            with tifffile.TiffFile(part, mode="r+") as file:
                for page in file.pages:
                    page.tags["Compression"].overwrite(_JPEG)
                    page.tags["PhotometricInterpretation"].overwrite(_YCBCR)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _tiles(which: np.ndarray[Any, Any], size: tuple[int, int], shrunk: int, compression: str) -> Iterator[bytes]:
    """The tiles of a level, encoded, in order."""
    side = TILE // shrunk  # pixels of a tile of the full resolution here
    if not side:
        raise ValueError(f"a level 1/{shrunk} of the full resolution is smaller than a pixel a tile")
    kinds = [_shrunk(kind, shrunk) for kind in range(KINDS)]
    once = functools.cache(lambda kind: _encoded(kinds[kind], compression))
    for top in range(0, size[0], TILE):
        for left in range(0, size[1], TILE):
            those = which[top // side : top // side + shrunk, left // side : left // side + shrunk]
            if shrunk == 1:
                yield once(int(those[0, 0]))
                continue
            tile = np.full((TILE, TILE, 3), 255, np.uint8)
            for (row, column), kind in np.ndenumerate(those):
                tile[row * side : (row + 1) * side, column * side : (column + 1) * side] = kinds[kind]
            yield _encoded(tile, compression)


def _encoded(tile: Pixels, compression: str) -> bytes:
    if compression == "deflate":
        return zlib.compress(tile.tobytes())
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(tile).save(file, "JPEG", quality=80, subsampling="4:2:0")
    return file.getvalue()


@functools.cache
def _kind(kind: int) -> Pixels:
    """A tile of tissue: a pink ground with nuclei, darker and more of them the higher its number."""
    random = np.random.default_rng(kind)
    rows, columns = np.mgrid[:TILE, :TILE]
    tile = np.array([228.0, 178, 205]) + random.normal(0, 6, (TILE, TILE, 1)) - np.array([1, 2, 1]) * kind
    for row, column, radius in random.uniform((0, 0, 4), (TILE, TILE, 10), (10 + 2 * kind, 3)):
        inside = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
        tile[inside] = tile[inside] * 0.4 + np.array([80, 40, 120]) * 0.6
    return np.clip(tile, 0, 255).astype(np.uint8)


def _shrunk(kind: int, by: int) -> Pixels:
    tile = _kind(kind).astype(np.float32)
    return tile.reshape(TILE // by, by, TILE // by, by, 3).mean((1, 3)).round().astype(np.uint8)
