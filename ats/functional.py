"""Attention sampling as functions: draw cells of an attention map, read their patches, pool their features."""

import torch
from torch import Tensor

import ats_kernels
from ats._renamed import renamed_option
from ats.cells import check_logits, mask_logits, sample_cells
from ats.grid import Placement, make_grid
from ats.pooling import estimate_pooled, pool
from ats.samples import BoxSample, CellSample, PatchSample, Selection
from ats_kernels import area_downsample, estimator_weights, expectation
from ats_kernels.checks import Normalisation, check_count, check_image, check_pair, check_tensor
from ats_kernels.pixels import blames_pixels
from ats_kernels.plausible import check_strip

__all__ = [
    "BoxSample",
    "CellSample",
    "PatchSample",
    "area_downsample",
    "estimate_pooled",
    "estimator_weights",
    "expectation",
    "extract_cells",
    "mask_logits",
    "pool",
    "read_patches",
    "sample_cells",
    "sample_patches",
]


@renamed_option("method", "selection")
@blames_pixels
def sample_patches(
    image: Tensor,
    logits: Tensor,
    n_patches: int,
    patch_size: int | tuple[int, int],
    *,
    replace: bool = False,
    selection: Selection = "sample",
    mask: Tensor | None = None,
    allow_fewer: bool | None = None,
    receptive_field: int | Placement = 0,
    view_size: tuple[int, int] | None = None,
    padding: str = "zeros",
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
            or on the CPU (pinned for speed) while the logits are on a GPU.
        logits: (B, gh, gw) or (B, 1, gh, gw), unnormalised log attention; −inf masks a cell.
        n_patches: patches an image.
        patch_size: pixels, an int or (ph, pw).
        replace, selection, mask, allow_fewer, generator, validate: as in `sample_cells`.
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
    check_inputs(image, logits)
    n_patches = check_count("n_patches", n_patches)
    patch = check_pair("patch_size", patch_size)
    view = check_view_size(view_size, receptive_field, (image.shape[2], image.shape[3]))
    cells = sample_cells(
        logits,
        n_patches,
        replace=replace,
        selection=selection,
        mask=mask,
        allow_fewer=allow_fewer,
        generator=generator,
        validate=validate,
    )
    return read_patches(
        image,
        cells,
        patch,
        receptive_field=receptive_field,
        view_size=view,
        padding=padding,
        mean=mean,
        std=std,
        dtype=dtype,
    )


def read_patches(
    image: Tensor,
    cells: CellSample,
    patch_size: int | tuple[int, int],
    *,
    receptive_field: int | Placement = 0,
    view_size: tuple[int, int] | None = None,
    padding: str = "zeros",
    mean: Normalisation = None,
    std: Normalisation = None,
    dtype: torch.dtype | None = None,
) -> PatchSample:
    """Read the patches of drawn cells from the full-resolution images.

    Args:
        image: (B, C, H, W), as in `sample_patches`.
        cells: what `sample_cells` drew.
        patch_size: pixels, an int or (ph, pw).
        receptive_field: where cells lie in the view: a `Placement` (`ats.measure_placement` finds it for any
            network), or the view pixels that an unpadded attention network loses along an axis.
        view_size: pixels (h, w) of the view the logits came from; needed only with a receptive_field.
        padding: what is read outside an image: "zeros" or "edge", the nearest pixel.
        mean, std: a float, or one a channel: patches are (x − mean) / std. A uint8 image is scaled by 1/255 before,
            so that its mean and std are those of values in [0, 1]; no other is scaled.
        dtype: of the patches; float32 for whole numbers and the image's own otherwise.

    Returns:
        `PatchSample`, on the cells' device. At a surplus draw it has the image's first patch once more.
    """
    if not isinstance(cells, CellSample):
        raise TypeError(f"cells must be a CellSample, as ats.sample_cells gives it, got {type(cells).__name__}")
    check_image(image)
    _check_together(image, cells.indices, "cells")
    patches, offsets = extract_cells(
        image,
        cells.readable(),
        cells.grid_size,
        check_pair("patch_size", patch_size),
        view_size=check_view_size(view_size, receptive_field, (image.shape[2], image.shape[3])),
        receptive_field=receptive_field,
        padding=padding,
        mean=mean,
        std=std,
        dtype=dtype,
    )
    return PatchSample.of(cells, patches, offsets)


def extract_cells(
    image: Tensor,
    indices: Tensor,
    grid_size: tuple[int, int],
    patch_size: tuple[int, int],
    *,
    view_size: tuple[int, int] | None = None,
    receptive_field: int | Placement = 0,
    padding: str = "zeros",
    mean: Normalisation = None,
    std: Normalisation = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Read the patches of given cells, indices (B, N): patches (B, N, C, ph, pw) and their offsets (B, N, 2).

    The arguments are those of `read_patches`. Patches come out on the indices' device.
    """
    image_size = (image.shape[2], image.shape[3])
    rows, columns = make_grid(grid_size, image_size, view_size, receptive_field).affine(patch_size)
    return ats_kernels.extract_cells(
        image, indices, grid_size, rows, columns, patch_size, padding=padding, mean=mean, std=std, dtype=dtype
    )


def check_inputs(image: Tensor, logits: Tensor) -> None:
    """Raise unless `image` (B, C, H, W) and `logits` (B, gh, gw) or (B, 1, gh, gw) go together."""
    check_image(image)
    _check_swapped(image, logits)
    check_logits(logits)
    _check_together(image, logits, "logits")
    check_strip((logits.shape[-2], logits.shape[-1]), (image.shape[2], image.shape[3]))


def _check_swapped(image: Tensor, logits: Tensor) -> None:
    check_tensor("logits", logits)
    unfit = logits.ndim == 4 and (logits.shape[1] != 1 or not logits.is_floating_point())
    if unfit and logits.shape[2] > image.shape[2] and logits.shape[3] > image.shape[3]:
        raise ValueError(
            f"logits {tuple(logits.shape)} of {logits.dtype} are larger than the image, {tuple(image.shape)}: "
            "are the two swapped? The image comes first"
        )


def _check_together(image: Tensor, drawn: Tensor, name: str) -> None:
    if drawn.shape[0] != image.shape[0]:
        raise ValueError(f"image has batch size {image.shape[0]} but {name} have {drawn.shape[0]}; they must agree")
    if image.device != drawn.device and image.device.type != "cpu":
        raise ValueError(
            f"image is on {image.device} but {name} are on {drawn.device}; move the image there, or leave it on "
            "the CPU, from where only the patches are copied"
        )


def check_view(view: Tensor, image: Tensor, receptive_field: int | Placement) -> None:
    """Raise unless `view` (B, C, h, w) can be the view of `image` (B, C, H, W), e.g. where the two are swapped."""
    check_image(image)
    check_tensor("view", view)
    check_view_size((view.shape[-2], view.shape[-1]), receptive_field, (image.shape[2], image.shape[3]))


def check_view_size(
    view_size: tuple[int, int] | None, receptive_field: int | Placement, image_size: tuple[int, int]
) -> tuple[int, int] | None:
    """Return the view's size as a pair, or raise where it is missing or fits neither image nor receptive field."""
    placed = isinstance(receptive_field, Placement)
    if not placed:
        receptive_field = check_count("receptive_field", receptive_field, least=0)
    if view_size is None:
        if receptive_field:
            raise ValueError(
                f"receptive_field={receptive_field} is in pixels of the view: pass view_size=(h, w) as well"
            )
        return None
    height, width = check_pair("view_size", view_size)
    if height > image_size[0] or width > image_size[1]:
        raise ValueError(
            f"view_size {(height, width)} is larger than the image, {image_size}; the view is the image shrunk: "
            "are the two swapped?"
        )
    if isinstance(receptive_field, int) and receptive_field >= min(height, width):
        raise ValueError(
            f"receptive_field={receptive_field} leaves nothing of a view of {(height, width)}; "
            "it is the view pixels lost along an axis"
        )
    return height, width
