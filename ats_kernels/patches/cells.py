"""Where the patches of cells begin: the map from a grid's cells to pixels, in integers.

Of a cell in row i the patch's first pixel is (a·i + b)/d, rounded half to even, and along columns likewise.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_EXACT = 2**51  # whole numbers up to here, divided in float64, round as the fractions do


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
    return quotient + (2 * (numerator - quotient * d) + quotient % 2 > d)  # a half goes up from an odd number only


def cell_offsets_cpu(indices: Tensor, cells: CellMap) -> Tensor:
    """`cell_offsets_ref` on the CPU by NumPy, whose small operations cost a third of PyTorch's."""
    a, b, d, largest = _columns(cells)
    flat = indices.numpy().reshape(-1)
    if largest > _EXACT:
        return cell_offsets_ref(indices, cells)
    pixels = np.empty((2, flat.size))
    np.divmod(flat, cells.grid_size[1], pixels[0], pixels[1])
    np.multiply(pixels, a, pixels)
    np.add(pixels, b, pixels)
    np.divide(pixels, d, pixels)  # of whole numbers so small only those that are a half become one
    np.rint(pixels, pixels)
    return torch.from_numpy(pixels.T.astype(np.int64, order="C")).view(*indices.shape, 2)


@lru_cache
def _columns(cells: CellMap) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """a, b and d of both axes, (2, 1) each, and the largest number that comes of them within twice the grid."""
    largest = max(2 * size * abs(a) + abs(b) + d for size, (a, b, d) in zip(cells.grid_size, cells[1:], strict=True))
    a, b, d = (np.array(pair, np.float64)[:, None] for pair in zip(*cells[1:], strict=True))
    return a, b, d, largest
