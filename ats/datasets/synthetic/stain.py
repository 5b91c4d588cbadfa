"""Two kinds of brown spots in stained tissue, alike from afar: in one the nuclei are brown, the other is smeared.

As in immunohistochemistry, where stained nuclei mean something and diffuse staining does not. A smeared spot is the
change that would have been made to the nuclei there, blurred: the mean colour of a spot and all around says nothing of
which kind it is. Arithmetic is of integers, so that it is the same everywhere.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ats.datasets.integers import Integers

_BROWN = np.array([80, 18, -85], np.int32)  # what is added to a nucleus: from blue-violet to brown
_DARK, _RAMP = 150, 5  # nuclei are below this red; in full where they are 255 / _RAMP below it
_BRIGHT = 215  # background, in all colours
_EDGE = 16  # pixels over which a spot fades
_BLUR = 25  # pixels a side of the box that is laid over a smeared spot, twice


@dataclass(frozen=True)
class Spot:
    """A round spot: its middle (row, column) and radius in pixels, how much its nuclei are changed, in 256ths, and
    whether the change is smeared."""

    row: int
    column: int
    radius: int
    strength: int
    smeared: bool

    def box(self) -> tuple[slice, slice]:
        """Rows and columns of the square around it, which must lie in the image."""
        return slice(self.row - self.radius, self.row + self.radius), slice(
            self.column - self.radius, self.column + self.radius
        )


def nuclei(pixels: NDArray[np.uint8]) -> NDArray[np.int32]:
    """How much of each pixel (H, W) of tissue (H, W, 3) is nucleus, 0 to 255: what is dark to red light."""
    return np.clip((_DARK - np.arange(256, dtype=np.int32)) * _RAMP, 0, 255)[pixels[..., 0]]


def shade(pixels: NDArray[np.uint8], random: Integers) -> NDArray[np.uint8]:
    """The tissue as stained and scanned elsewhere: each colour's darkness by a factor between 0.88 and 1.15."""
    darkness, shaded = np.arange(255, -1, -1, dtype=np.int32), np.empty_like(pixels)
    for channel in range(3):
        values = 255 - np.minimum(255, darkness * random.between(225, 294) // 256)
        shaded[..., channel] = values.astype(np.uint8)[pixels[..., channel]]
    return shaded


def plant(pixels: NDArray[np.uint8], amount: NDArray[np.int32], spot: Spot) -> None:
    """Stain a spot of an image (H, W, 3), in place.

    Args:
        pixels: the image.
        amount: of nucleus in each pixel, as `nuclei` says of it.
        spot: where, and of which kind.
    """
    reach = spot.radius + 2 * _BLUR
    rows = slice(max(0, spot.row - reach), spot.row + reach + 1)
    columns = slice(max(0, spot.column - reach), spot.column + reach + 1)
    part = pixels[rows, columns]
    much = amount[rows, columns] * _disc(spot, rows, columns, part.shape)  # 255² where all is changed
    if spot.smeared:
        much = _blurred(_blurred(much))
    scale = 255 * 255 * 256
    change = (much.astype(np.int64)[..., None] * _BROWN * spot.strength + scale // 2) // scale  # rounded
    pixels[rows, columns] = (part + change).clip(0, 255).astype(np.uint8)


def is_tissue(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where an image (H, W, 3) is not as bright as background is, (H, W)."""
    return np.minimum(np.minimum(pixels[..., 0], pixels[..., 1]), pixels[..., 2]) < _BRIGHT


def contrast(amount: NDArray[np.int32], spot: Spot) -> int:
    """By how much the two kinds differ within a spot: the mean of |sharp − blurred|, 0 to 255."""
    part = amount[spot.box()]
    return int(np.abs(part - _blurred(_blurred(part))).mean())


def _disc(spot: Spot, rows: slice, columns: slice, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """255 within, 0 outside, and an edge that is soft."""
    down = np.arange(shape[0], dtype=np.int64)[:, None] + rows.start - spot.row
    right = np.arange(shape[1], dtype=np.int64) + columns.start - spot.column
    squared = down**2 + right**2
    # (r² − d²) / 2r is about r − d near the edge
    inside = (spot.radius**2 - squared) * 255 // (2 * spot.radius * _EDGE)
    return np.clip(inside, 0, 255).astype(np.int32)


def _blurred(values: NDArray[np.int32]) -> NDArray[np.int32]:
    """The mean of a box about each pixel; there is nothing outside the image."""
    for axis in (0, 1):
        half = _BLUR // 2
        padding = [(0, 0), (0, 0)]
        padding[axis] = (half + 1, half)
        sums = np.cumsum(np.pad(values, padding), axis=axis, dtype=np.int64)
        ends = np.take(sums, np.arange(_BLUR, sums.shape[axis]), axis)
        starts = np.take(sums, np.arange(sums.shape[axis] - _BLUR), axis)
        values = ((ends - starts) // _BLUR).astype(np.int32)
    return values
