"""Where the patches of cells begin: the map from a grid's cells to pixels, in integers.

Of a cell in row i the patch's first pixel is (a·i + b)/d, rounded half to even, and along columns likewise.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class CellMap(NamedTuple):
    """Cells of a row-major grid, and (a, b, d) along each axis, d > 0."""

    grid_size: tuple[int, int]  # (gh, gw)
    rows: tuple[int, int, int]
    columns: tuple[int, int, int]


def cell_offsets_ref(indices: Tensor, cells: CellMap) -> Tensor:
    """The top-left pixels (…, 2) int64 (y, x) of flat cells (…)."""
    indices, width = indices.long(), cells.grid_size[1]
    return torch.stack([_first_pixel(indices // width, cells.rows), _first_pixel(indices % width, cells.columns)], -1)


def _first_pixel(cell: Tensor, affine: tuple[int, int, int]) -> Tensor:
    a, b, d = affine
    numerator = a * cell + b
    quotient = numerator.div(d, rounding_mode="floor")
    twice_rest = 2 * (numerator - quotient * d)
    return quotient + ((twice_rest > d) | ((twice_rest == d) & (quotient % 2 == 1)))
