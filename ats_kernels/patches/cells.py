"""Where the patches of cells begin: the map from a grid's cells to pixels, in integers.

Of a cell in row i the patch's first pixel is (a·i + b)/d, rounded half to even, and along columns likewise.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
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
    return quotient + (2 * (numerator - quotient * d) + quotient % 2 > d)  # a half goes up from an odd number only


def cell_offsets_cpu(indices: Tensor, cells: CellMap) -> Tensor:
    """`cell_offsets_ref` on the CPU by NumPy, whose small operations cost a third of PyTorch's."""
    a, b, d = _columns(cells.rows, cells.columns)
    flat = indices.numpy().reshape(-1)
    pixels = np.empty((2, flat.size), np.int64)
    np.divmod(flat, cells.grid_size[1], pixels[0], pixels[1])
    np.multiply(pixels, a, pixels)
    np.add(pixels, b, pixels)
    quotient, rest = np.divmod(pixels, d)
    quotient += 2 * rest + (quotient & 1) > d
    return torch.from_numpy(np.ascontiguousarray(quotient.T)).view(*indices.shape, 2)


@lru_cache
def _columns(rows: tuple[int, int, int], columns: tuple[int, int, int]) -> tuple[np.ndarray, ...]:
    """a, b and d of both axes, (2, 1) each."""
    return tuple(np.array(pair, np.int64)[:, None] for pair in zip(rows, columns, strict=True))
