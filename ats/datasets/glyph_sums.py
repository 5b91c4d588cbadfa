"""Means of boxes of an image made of glyphs, from sums over parts of each glyph: no pixel in between is made."""

from typing import Any

import numpy as np

from ats.datasets.megapixel_mnist import GLYPH

Ints = np.ndarray[Any, np.dtype[np.int64]]


def over(shade: int, glyphs: "np.ndarray[Any, np.dtype[np.uint8]]") -> "np.ndarray[Any, np.dtype[np.int32]]":
    """What glyphs (G, 28, 28) add to the ground that they lie on, of which the brighter wins: the sums over all pixels
    above and left of each corner, (G, 29, 29)."""
    sums = np.zeros((len(glyphs), GLYPH + 1, GLYPH + 1), np.int32)
    if len(glyphs):
        np.maximum(glyphs.astype(np.int32) - shade, 0, out=sums[:, 1:, 1:])
        np.cumsum(sums, axis=1, out=sums)
        np.cumsum(sums, axis=2, out=sums)
    return sums


def covered(begin: int, size: int, scale: int, count: int) -> Ints:
    """How many pixels of [begin, begin + size) lie in each of `count` stretches of `scale` pixels."""
    edges = np.clip(np.arange(count + 1) * scale - begin, 0, size)
    return np.diff(edges)


def add_glyphs(total: Ints, sums: "np.ndarray[Any, np.dtype[np.int32]]", which: Ints, begin: Ints, scale: int) -> None:
    """Add what glyphs at (G, 2) pixels of the box hold to the view's pixels (h, w)."""
    if not len(which):
        return
    most = (GLYPH - 1) // scale + 2  # view pixels that a glyph can lie in, along an axis
    first = begin // scale  # (G, 2), of the view
    steps = np.arange(most + 1) * scale
    edges = np.clip(steps - (begin - first * scale)[..., None], 0, GLYPH)  # (G, 2, most + 1)
    corners = sums[which[:, None, None], edges[:, 0, :, None], edges[:, 1, None, :]]
    parts = np.diff(np.diff(corners, axis=1), axis=2)  # (G, most, most)
    rows, columns = (first[:, axis, None] + np.arange(most) for axis in (0, 1))  # (G, most) each
    down, across = (rows >= 0) & (rows < total.shape[0]), (columns >= 0) & (columns < total.shape[1])
    inside = down[:, :, None] & across[:, None]
    flat = (rows[:, :, None] * total.shape[1] + columns[:, None])[inside]
    total += np.bincount(flat, parts[inside], total.size).astype(np.int64).reshape(total.shape)
