"""Attention, or where drawn patches lie, as a picture of the image."""

from fractions import Fraction

import torch
from torch import Tensor

from ats.cells import check_drawable, check_logits, mask_logits
from ats.grid import Grid, Placement, make_grid
from ats.samples import BoxSample, CellSample, Estimator
from ats_kernels.checks import check_pair


def heatmap(
    sample_or_logits: CellSample | Tensor,
    image_size: tuple[int, int],
    *,
    size: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    estimator: Estimator = "ordered",
    view_size: tuple[int, int] | None = None,
    receptive_field: int | Placement = 0,
) -> Tensor:
    """Attention spread over the pixels that it lies on: (B, h, w) float64, as mass, not as density.

    - Logits: each cell's attention over the pixels of the image that the cell covers.
    - `PatchSample` or `BoxSample`: each patch's weight in the estimate over the pixels of the patch.
    - `CellSample`: each draw's weight over the pixels of its cell.

    The pixels of a picture sum to the attention, or weight, that lies inside the image: 1, but for what cells or
    patches reach outside. A pixel that is covered in part has its part, so that a smaller picture is the sum of a
    larger one. No gradient goes through.

    Args:
        sample_or_logits: what was drawn, or logits (B, gh, gw) or (B, 1, gh, gw).
        image_size: pixels (H, W) of the full-resolution image.
        size: pixels (h, w) of the picture; the image's own where None, which is much for a large image.
        mask: of the logits, as in `ats.sample_cells`.
        estimator: what a sample's weights are those of, as in `ats.expectation`.
        view_size, receptive_field: where cells lie, as in `ats.sample_patches`; a sample's boxes know it.

    Raises:
        ValueError: an image with every cell masked, NaN or +inf logits, sizes that do not fit.
    """
    image = check_pair("image_size", image_size)
    picture = image if size is None else check_pair("size", size)
    if isinstance(sample_or_logits, BoxSample):
        weights = sample_or_logits.weights(estimator).double()  # (B, N)
        rows, columns = (
            _shares(
                sample_or_logits.offsets[..., axis].double(),
                float(sample_or_logits.patch_size[axis]),
                image[axis],
                picture[axis],
            )
            for axis in (0, 1)
        )  # (B, N, h), (B, N, w)
        return (weights.unsqueeze(-1) * rows).transpose(1, 2) @ columns
    if isinstance(sample_or_logits, CellSample):
        cells = sample_or_logits.grid_size
        weights = sample_or_logits.weights(estimator).double()
        mass = weights.new_zeros(len(weights), cells[0] * cells[1])
        mass = mass.scatter_add_(1, sample_or_logits.readable().clamp(min=0), weights).unflatten(1, cells)
    else:
        check_logits(sample_or_logits)
        logits = mask_logits(sample_or_logits.detach(), mask)
        check_drawable(logits)
        cells = (logits.shape[-2], logits.shape[-1])
        mass = logits.flatten(1).double().softmax(-1).unflatten(1, cells)  # (B, gh, gw)
    grid = make_grid(cells, image, view_size, receptive_field)
    rows, columns = (_cell_shares(grid, axis, picture[axis], mass.device) for axis in (0, 1))  # (gh, h), (gw, w)
    return rows.T @ mass @ columns


def _cell_shares(grid: Grid, axis: int, pixels: int, device: torch.device) -> Tensor:
    """How each cell (g,) of an axis is shared out over the pixels (p,) of a picture."""
    origin, cells, view = grid.origin[axis], grid.cells[axis], grid.view[axis]
    step = (view - 2 * origin) / cells if grid.step is None else grid.step[axis]
    scale = Fraction(grid.image[axis], view)
    number = torch.arange(cells, dtype=torch.float64, device=device)
    return _shares(float(origin * scale) + number * float(step * scale), float(step * scale), grid.image[axis], pixels)


def _shares(first: Tensor, length: float, image: int, pixels: int) -> Tensor:
    """The shares (…, p) of intervals [first, first + length) of an image's axis that lie on each pixel of a picture."""
    edges = torch.arange(pixels + 1, dtype=torch.float64, device=first.device) * (image / pixels)
    below = (edges - first.unsqueeze(-1)).clamp(0, length)  # of each interval, what lies before each edge
    return below.diff(dim=-1) / length
