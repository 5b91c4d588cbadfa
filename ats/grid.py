"""Where the cells of an attention map lie in the full-resolution image.

Along one axis, with H pixels in the image, h in the view, and cells that begin at view pixel o and are s view pixels
apart,

    centre_i = (o + (i + ½)·s)·H/h          top_i = round(centre_i − p/2)

rounded half to even. All of it is rational, so it is computed in integers: the same on every device, and a half is a
half. An unpadded network that loses rf view pixels begins at o = rf/2 and has s = (h − rf)/g, g the cells;
`ats.receptive_field` measures networks.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from ats_kernels.checks import check_count, check_pair
from ats_kernels.patches.cells import CellMap, cell_offsets_ref


class Affine(NamedTuple):
    """The first pixel of cell i's patch along an axis: (a·i + b)/d, rounded half to even."""

    a: int
    b: int
    d: int


@dataclass(frozen=True)
class Grid:
    """The cells of an attention map, and how they lie in an image.

    Attributes:
        cells: (gh, gw).
        image: pixels (H, W) of the full-resolution image.
        view: pixels (h, w) of the view that the attention network saw.
        origin: view pixels (y, x) at which the first cell begins: its centre less half a step.
        step: view pixels (y, x) from one cell to the next; None: what the cells divide the view into, less the origin
            at both ends.
    """

    cells: tuple[int, int]
    image: tuple[int, int]
    view: tuple[int, int]
    origin: tuple[Fraction, Fraction] = (Fraction(0), Fraction(0))
    step: tuple[Fraction, Fraction] | None = None

    def affine(self, patch_size: tuple[int, int]) -> tuple[Affine, Affine]:
        """What turns the rows and the columns of cells into the first pixels of their patches (ph, pw)."""
        return self._along(0, patch_size[0]), self._along(1, patch_size[1])

    def _along(self, axis: int, patch: int) -> Affine:
        cells, image, view = self.cells[axis], self.image[axis], self.view[axis]
        on, od = self.origin[axis].numerator, self.origin[axis].denominator
        if self.step is None:
            covered = view * od - 2 * on  # view pixels that the cells cover, times od
            a, d = 2 * covered * image, 2 * od * view * cells
            b = covered * image + (2 * on * image - patch * od * view) * cells
        else:
            sn, sd = self.step[axis].numerator, self.step[axis].denominator
            a, d = 2 * sn * od * image, 2 * od * sd * view
            b = sn * od * image + 2 * on * sd * image - patch * od * sd * view
        return Affine(a, b, d)

    def offsets(self, indices: Tensor, patch_size: tuple[int, int]) -> Tensor:
        """The top-left pixels (…, 2) int64 (y, x) of the patches centred on flat cells (…) int64."""
        return cell_offsets_ref(indices, CellMap(self.cells, *self.affine(patch_size)))


def cell_offsets(
    indices: Tensor,
    grid_size: tuple[int, int],
    image_size: tuple[int, int],
    patch_size: tuple[int, int],
    *,
    view_size: tuple[int, int] | None = None,
    receptive_field: int = 0,
) -> Tensor:
    """Top-left pixels of the patches centred on cells.

    Args:
        indices: (…) int64, flat cells of a row-major grid.
        grid_size: cells (gh, gw).
        image_size: pixels (H, W).
        patch_size: pixels (ph, pw).
        view_size: pixels (h, w) of the view; needed only where receptive_field > 0.
        receptive_field: view pixels that the attention network loses along an axis, see `ats.receptive_field`.

    Returns:
        (…, 2) int64 pixels (y, x). Patches near the border start or end outside the image.
    """
    origin = Fraction(check_count("receptive_field", receptive_field, least=0), 2)
    image = check_pair("image_size", image_size)
    view = image if view_size is None else check_pair("view_size", view_size)  # without a loss the view cancels out
    grid = Grid(check_pair("grid_size", grid_size), image, view, (origin, origin))
    return grid.offsets(indices, check_pair("patch_size", patch_size))


def patch_positions(offsets: Tensor, patch_size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Where the centres of patches lie in the image: 0 its top or left edge, 1 its bottom or right edge.

    Args:
        offsets: (…, 2) int64, top-left pixels (y, x), as `cell_offsets` gives them.
        patch_size: pixels (ph, pw).
        image_size: pixels (H, W).

    Returns:
        (…, 2) float32 in [0, 1], (y, x).

    Source: paper, end of section 3.4.
    """
    # Sizes as numbers: a tensor of them on a GPU would make the host wait, and cannot be captured in a graph.
    sizes = check_pair("patch_size", patch_size), check_pair("image_size", image_size)
    axes = zip(offsets.double().unbind(-1), *sizes, strict=True)
    return torch.stack([(first + patch / 2) / pixels for first, patch, pixels in axes], dim=-1).float()
