"""Attention sampling as functions: draw cells of an attention map, read their patches, pool their features."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ats._renamed import renamed_option
from ats.batches import (
    GridSizes,
    Images,
    Maps,
    Sizes,
    check_grid_sizes,
    check_images,
    check_not_padded,
    check_view,
    check_view_size,
    each_size,
    is_many,
    pad_logits,
    sizes_of,
)
from ats.cells import check_logits, draw_cells, live_cells, mask_logits, mean_entropy, relative_entropy, sample_cells
from ats.grid import Placement, cell_map
from ats.pooling import estimate_pooled, pool
from ats.reading import read_cells
from ats.samples import BoxSample, CellSample, PatchSample, Selection
from ats_kernels import area_downsample, estimator_weights, expectation
from ats_kernels.checks import Normalisation, Padding, check_count, check_pair, check_tensor
from ats_kernels.patches.op import read_checked
from ats_kernels.pixels import blames_pixels
from ats_kernels.plausible import check_strip

__all__ = [
    "BoxSample",
    "CellSample",
    "PatchSample",
    "area_downsample",
    "check_view",
    "estimate_pooled",
    "estimator_weights",
    "expectation",
    "extract_cells",
    "live_cells",
    "mask_logits",
    "mean_entropy",
    "pad_logits",
    "pool",
    "read_patches",
    "relative_entropy",
    "sample_cells",
    "sample_patches",
]


@renamed_option("method", "selection")
@blames_pixels
def sample_patches(
    image: Images,
    logits: Maps,
    n_patches: int,
    patch_size: int | tuple[int, int],
    *,
    replace: bool = False,
    selection: Selection = "sample",
    mask: Maps | None = None,
    allow_fewer: bool | None = None,
    grid_sizes: Sequence[tuple[int, int]] | None = None,
    receptive_field: int | Placement = 0,
    view_size: Sizes | None = None,
    padding: Padding = "zeros",
    mean: Normalisation = None,
    std: Normalisation = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    validate: bool | None = None,
) -> PatchSample:
    """Draw patches where the attention is, and read only those from the full-resolution images.

    `sample_cells` and then `read_patches`, whose options it takes.

    Args:
        image: (B, C, H, W) uint8, uint16, int16 or floating point (16 to 64 bits), any strides; on the logits' device,
            or on the CPU (pinned for speed) while the logits are on a GPU. Or a sequence of tensors (C, H, W) and
            `ats.ImageSource`s of any sizes, alike in channels and dtype; patches of sources are read by threads.
        logits: (B, gh, gw) or (B, 1, gh, gw), unnormalised log attention; −inf masks a cell. Of images whose grids
            differ, a list of maps (gh, gw).
        n_patches: patches an image.
        patch_size: pixels, an int or (ph, pw).
        replace, selection, mask, allow_fewer, grid_sizes, generator, validate: as in `sample_cells`.
        receptive_field, view_size, padding, mean, std, dtype: as in `read_patches`.

    Returns:
        `PatchSample`. Without validation, an image whose attention cannot be drawn from comes back with index −1
        and NaN log_attention, which makes everything pooled with it NaN.

    Raises:
        TypeError: logits that are not floating point; an image, `dtype` or `generator` that does not fit.
        ValueError: wrong ranks, channels that seem to come last, batches that differ, more patches than cells that
            can be drawn, NaN or +inf logits, a row with every cell masked, unknown options, sizes that do not fit.

    Source: paper, section 3; the cell-to-pixel map is described in `ats.grid`.
    """
    padded, own = own_grids(image, logits, grid_sizes, view_size)
    n_patches = check_count("n_patches", n_patches)
    patch = check_pair("patch_size", patch_size)
    view = check_view_size(view_size, receptive_field, sizes_of(image))
    cells = draw_cells(
        padded,
        own,
        n_patches,
        replace=replace,
        selection=selection,
        mask=mask,
        allow_fewer=allow_fewer,
        generator=generator,
        validate=validate,
    )
    return _read(image, cells, patch, view, receptive_field, padding, mean, std, dtype)


def read_patches(
    image: Images,
    cells: CellSample,
    patch_size: int | tuple[int, int],
    *,
    receptive_field: int | Placement = 0,
    view_size: Sizes | None = None,
    padding: Padding = "zeros",
    mean: Normalisation = None,
    std: Normalisation = None,
    dtype: torch.dtype | None = None,
) -> PatchSample:
    """Read the patches of drawn cells from the full-resolution images.

    Args:
        image: (B, C, H, W) or a sequence, as in `sample_patches`.
        cells: what `sample_cells` drew.
        patch_size: pixels, an int or (ph, pw).
        receptive_field: where cells lie in the view: a `Placement` (`ats.measure_placement` finds it for any
            network), or the view pixels that an unpadded attention network loses along an axis.
        view_size: pixels (h, w) of the view the logits came from, or a list of one an image; needed only with a
            receptive_field.
        padding: what is read outside an image: "zeros" or "edge", the nearest pixel.
        mean, std: a float, or one a channel: patches are (x − mean) / std. A uint8 image is scaled by 1/255 before,
            so that its mean and std are those of values in [0, 1]; no other is scaled.
        dtype: of the patches; float32 for whole numbers and the image's own otherwise.

    Returns:
        `PatchSample`, on the cells' device. At a surplus draw it has the image's first patch once more.
    """
    if not isinstance(cells, CellSample):
        raise TypeError(f"cells must be a CellSample, as ats.sample_cells gives it, got {type(cells).__name__}")
    check_images(image)
    _check_together(image, cells.indices, "cells")
    patch = check_pair("patch_size", patch_size)
    view = check_view_size(view_size, receptive_field, sizes_of(image))
    return _read(image, cells, patch, view, receptive_field, padding, mean, std, dtype)


def _read(
    image: Images,
    cells: CellSample,
    patch_size: tuple[int, int],
    view_size: Sizes | None,
    receptive_field: int | Placement,
    padding: Padding,
    mean: Normalisation,
    std: Normalisation,
    dtype: torch.dtype | None,
) -> PatchSample:
    """`read_patches` of what is checked and goes together."""
    patches, offsets = _extract(
        image,
        cells.readable(),
        cells.grid_size,
        patch_size,
        cells.grid_sizes,
        view_size,
        receptive_field,
        padding,
        mean,
        std,
        dtype,
    )
    return PatchSample.of(cells, patches, offsets)


def extract_cells(
    image: Images,
    indices: Tensor,
    grid_size: tuple[int, int],
    patch_size: tuple[int, int],
    *,
    grid_sizes: GridSizes = None,
    view_size: Sizes | None = None,
    receptive_field: int | Placement = 0,
    padding: Padding = "zeros",
    mean: Normalisation = None,
    std: Normalisation = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Read the patches of given cells, indices (B, N): patches (B, N, C, ph, pw) and their offsets (B, N, 2).

    The arguments are those of `read_patches`; `grid_sizes` are each image's own cells, the top left part of the grid.
    Patches come out on the indices' device.
    """
    check_images(image)
    size = check_pair("patch_size", patch_size)
    return _extract(image, indices, grid_size, size, grid_sizes, view_size, receptive_field, padding, mean, std, dtype)


def _extract(
    image: Images,
    indices: Tensor,
    grid_size: tuple[int, int],
    patch_size: tuple[int, int],
    grid_sizes: GridSizes,
    view_size: Sizes | None,
    receptive_field: int | Placement,
    padding: Padding,
    mean: Normalisation,
    std: Normalisation,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """`extract_cells` of images that are checked."""
    if not isinstance(image, Tensor) or grid_sizes is not None or is_many(view_size):
        return read_cells(  # something differs from image to image, so that one launch does not read them all
            image.unbind(0) if isinstance(image, Tensor) else image,
            indices,
            grid_size,
            patch_size,
            grid_sizes=grid_sizes,
            view_size=view_size,
            receptive_field=receptive_field,
            padding=padding,
            mean=mean,
            std=std,
            dtype=dtype,
        )
    image_size = (image.shape[2], image.shape[3])
    cells = cell_map(grid_size, image_size, view_size, receptive_field, patch_size)
    check_strip(cells.grid_size, image_size)
    return read_checked(image, indices, cells, patch_size, padding, mean, std, dtype)


def own_grids(
    image: Images, logits: Maps, grid_sizes: Sequence[tuple[int, int]] | None, view_size: Sizes | None
) -> tuple[Tensor, GridSizes]:
    """Logits of a batch as one tensor, and each image's own grid where they differ; raise unless all go together."""
    check_images(image)
    if isinstance(image, Tensor) and isinstance(logits, Tensor):
        _check_swapped(image, logits)
    padded, own = pad_logits(logits)
    if own is None and grid_sizes is None:
        _check_fit(image, padded, None)
        check_not_padded(padded, image, view_size)
        return padded, None
    own = check_grid_sizes(own if grid_sizes is None else grid_sizes, padded)
    _check_fit(image, padded, own)
    return padded, own


def check_inputs(image: Images, logits: Tensor, grid_sizes: GridSizes = None) -> None:
    """Raise unless `image` and logits (B, gh, gw) or (B, 1, gh, gw) of its attention go together.

    `image` is (B, C, H, W) or a sequence.
    """
    check_images(image)
    if isinstance(image, Tensor):
        _check_swapped(image, logits)
    _check_fit(image, logits, grid_sizes)


def _check_fit(image: Images, logits: Tensor, grid_sizes: GridSizes) -> None:
    """`check_inputs` of images that are checked."""
    check_logits(logits)
    _check_together(image, logits, "logits")
    if isinstance(image, Tensor) and grid_sizes is None:
        check_strip((logits.shape[-2], logits.shape[-1]), (image.shape[2], image.shape[3]))
        return
    sizes = each_size("image_size", sizes_of(image), len(logits))
    for own, size in zip(grid_sizes or [(logits.shape[-2], logits.shape[-1])] * len(sizes), sizes, strict=True):
        check_strip(own, size)


def _check_swapped(image: Tensor, logits: Tensor) -> None:
    check_tensor("logits", logits)
    unfit = logits.ndim == 4 and (logits.shape[1] != 1 or not logits.is_floating_point())
    if unfit and logits.shape[2] > image.shape[2] and logits.shape[3] > image.shape[3]:
        raise ValueError(
            f"logits {tuple(logits.shape)} of {logits.dtype} are larger than the image, {tuple(image.shape)}: "
            "are the two swapped? The image comes first"
        )


def _check_together(image: Images, drawn: Tensor, name: str) -> None:
    batch = image.shape[0] if isinstance(image, Tensor) else len(image)
    if drawn.shape[0] != batch:
        raise ValueError(f"image has batch size {batch} but {name} have {drawn.shape[0]}; they must agree")
    for one in [image] if isinstance(image, Tensor) else image:
        if isinstance(one, Tensor) and one.device != drawn.device and one.device.type != "cpu":
            raise ValueError(
                f"image is on {one.device} but {name} are on {drawn.device}; move the image there, or leave it on "
                "the CPU, from where only the patches are copied"
            )
