"""Attention, or where drawn patches lie, as a picture of the image."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, overload

import torch
from torch import Tensor

from ats.batches import (
    Images,
    Maps,
    Sizes,
    check_grid_sizes,
    each_size,
    is_many,
    is_sequence,
    pad_logits,
    sizes_of,
)
from ats.cells import check_drawable, check_logits, mask_logits
from ats.grid import Grid, Placement, make_grid
from ats.nested_sample import NestedSample
from ats.samples import BoxSample, CellSample, Estimator
from ats.sources.image_source import ImageSource
from ats_kernels.checks import check_pair


@overload
def heatmap(
    sample_or_logits: CellSample | NestedSample | Maps,
    image_size: tuple[int, int] | Tensor,
    *,
    size: tuple[int, int] | None = ...,
    mask: Maps | None = ...,
    estimator: Estimator = ...,
    view_size: Sizes | None = ...,
    receptive_field: int | Placement = ...,
    grid_sizes: Sequence[tuple[int, int]] | None = ...,
) -> Tensor: ...
@overload
def heatmap(
    sample_or_logits: CellSample | NestedSample | Maps,
    image_size: Sequence[tuple[int, int]] | Sequence[Tensor | ImageSource],
    *,
    size: tuple[int, int] | None = ...,
    mask: Maps | None = ...,
    estimator: Estimator = ...,
    view_size: Sizes | None = ...,
    receptive_field: int | Placement = ...,
    grid_sizes: Sequence[tuple[int, int]] | None = ...,
) -> list[Tensor]: ...
def heatmap(
    sample_or_logits: CellSample | NestedSample | Maps,
    image_size: Sizes | Images,
    *,
    size: tuple[int, int] | None = None,
    mask: Maps | None = None,
    estimator: Estimator = "ordered",
    view_size: Sizes | None = None,
    receptive_field: int | Placement = 0,
    grid_sizes: Sequence[tuple[int, int]] | None = None,
) -> Tensor | list[Tensor]:
    """Attention spread over the pixels that it lies on: float64, as mass, not as density.

    - Logits: each cell's attention over the pixels of the image that the cell covers.
    - `PatchSample`, `BoxSample` or `NestedSample`: each patch's weight in the estimate over the pixels of the patch.
    - `CellSample`: each draw's weight over the pixels of its cell.

    The pixels of a picture sum to the attention, or weight, that lies inside the image: 1, but for what cells or
    patches reach outside. A pixel that is covered in part has its part, so that a smaller picture is the sum of a
    larger one. No gradient goes through.

    Args:
        sample_or_logits: what was drawn, or logits (B, gh, gw) or (B, 1, gh, gw), or a list of maps (gh, gw).
        image_size: pixels (H, W) of the full-resolution images; or a list of one an image; or the images themselves, a
            tensor (B, C, H, W) or a sequence.
        size: pixels (h, w) of the pictures; the image's own where None, which is much for a large image.
        mask: of the logits, as in `ats.sample_cells`.
        estimator: what a sample's weights are those of, as in `ats.expectation`.
        view_size, receptive_field: where cells lie, as in `ats.sample_patches`; a sample's boxes know it.
        grid_sizes: of padded logits, cells (gh, gw) of each image's own grid; a sample knows its own.

    Returns:
        (B, h, w) where `image_size` is one pair, or a tensor of images. A list of pictures (h, w), one an image, where
        it is a sequence, of sizes or of images, whether they differ or not.

    Raises:
        ValueError: an image with every cell masked, NaN or +inf logits, sizes that do not fit.
    """
    of_images = isinstance(image_size, Tensor) and image_size.ndim == 4
    of_images |= is_sequence(image_size) and any(isinstance(one, ImageSource) or _is_image(one) for one in image_size)
    sizes: Any = sizes_of(image_size) if of_images else image_size  # type: ignore[arg-type]
    drawn = sample_or_logits if isinstance(sample_or_logits, CellSample | NestedSample) else None
    if drawn is not None:
        logits, grids = None, drawn.grid_sizes if isinstance(drawn, CellSample) else None
    else:
        logits, own = pad_logits(sample_or_logits)  # type: ignore[arg-type]
        check_logits(logits)
        grids = check_grid_sizes(own if grid_sizes is None else grid_sizes, logits)
        logits = mask_logits(logits.detach(), mask, grids)
        check_drawable(logits)
    if not is_many(sizes) and grids is None and not is_many(view_size):
        image = check_pair("image_size", sizes)
        return _pictures(drawn, logits, image, size, estimator, view_size, receptive_field)
    batch = len(drawn) if drawn is not None else len(logits)  # type: ignore[arg-type]  # one of them is there
    images = each_size("image_size", sizes, batch)
    views = [None] * batch if view_size is None else each_size("view_size", view_size, batch)
    pictures = []
    for number, (image, view) in enumerate(zip(images, views, strict=True)):
        one = None if drawn is None else drawn[number]
        own_logits = None if logits is None else logits[number : number + 1]
        if own_logits is not None and grids is not None:
            own_logits = own_logits[..., : grids[number][0], : grids[number][1]]
        pictures.append(_pictures(one, own_logits, image, size, estimator, view, receptive_field)[0])
    return pictures if is_many(sizes) else torch.stack(pictures)


def _is_image(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3


def _pictures(
    sample: CellSample | NestedSample | None,
    logits: Tensor | None,
    image: tuple[int, int],
    size: tuple[int, int] | None,
    estimator: Estimator,
    view_size: tuple[int, int] | None,
    receptive_field: int | Placement,
) -> Tensor:
    """Pictures (B, h, w) of images that have one size and one grid."""
    picture = image if size is None else check_pair("size", size)
    if isinstance(sample, BoxSample | NestedSample):
        return box_pictures(sample.weights(estimator).double(), sample.offsets, sample.patch_size, image, picture)
    if sample is not None:
        cells = sample.grid_size
        weights = sample.weights(estimator).double()
        mass = weights.new_zeros(len(weights), cells[0] * cells[1])
        mass = mass.scatter_add_(1, sample.readable().clamp(min=0), weights).unflatten(1, cells)
        if sample.grid_sizes is not None:  # of a single image: nothing was drawn outside its own
            cells = sample.grid_sizes[0]
            mass = mass[:, : cells[0], : cells[1]]
    else:
        assert logits is not None
        cells = (logits.shape[-2], logits.shape[-1])
        mass = logits.flatten(1).double().softmax(-1).unflatten(1, cells)  # (B, gh, gw)
    grid = make_grid(cells, image, view_size, receptive_field)
    rows, columns = (_cell_shares(grid, axis, picture[axis], mass.device) for axis in (0, 1))  # (gh, h), (gw, w)
    return rows.T @ mass @ columns


def box_pictures(
    mass: Tensor, offsets: Tensor, size: tuple[int, int], image: tuple[int, int], picture: tuple[int, int]
) -> Tensor:
    """Mass (B, N) spread over boxes at offsets (B, N, 2), as pictures (B, h, w) of an image (H, W)."""
    rows, columns = (
        _shares(offsets[..., axis].double(), float(size[axis]), image[axis], picture[axis]) for axis in (0, 1)
    )  # (B, N, h), (B, N, w)
    return (mass.unsqueeze(-1) * rows).transpose(1, 2) @ columns


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
