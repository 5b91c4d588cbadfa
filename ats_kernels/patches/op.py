"""Cut patches out of full-resolution images.

``patches[b, n, c, y, x] = image[b, c, offsets[b, n, 0] + y, offsets[b, n, 1] + x]``: T(x, i) of the paper
(eq. 3). Only the patches are read. A patch may lie partly or wholly outside its image: there it reads zeros,
put in after normalisation, or the nearest pixel.
"""

from typing import Any, get_args

import torch
from torch import Tensor

from ats_kernels import advice
from ats_kernels.backend import wants_graph
from ats_kernels.checks import (
    Normalisation,
    Padding,
    check_choice,
    check_image,
    check_normalisation,
    check_pair,
    check_tensor,
    is_channels_last,
    output_dtype,
)
from ats_kernels.patches.cells import CellMap
from ats_kernels.patches.launch import Reading, Scattering, launch, launch_scatter, read_by

PADDINGS = get_args(Padding)


def _extract(image: Tensor, places: Tensor, how: Reading, backend: str) -> tuple[Tensor, Tensor]:
    """Patches and their offsets, by the kernels or the lean path."""
    if backend == "triton" and torch.compiler.is_compiling():
        from ats_kernels.patches.opaque import extract

        return extract(image, places, *how)
    return launch(image, places, how, backend)


class _ExtractPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, places: Tensor, how: Reading, backend: str) -> tuple[Tensor, Tensor]:
        patches, offsets = _extract(image, places, how, backend)
        ctx.save_for_backward(offsets)
        channels_last = is_channels_last(image)
        ctx.how = Scattering(image.shape, image.dtype, image.device, channels_last, how.padding, how.stds)
        ctx.backend = backend
        ctx.mark_non_differentiable(offsets)
        return patches, offsets

    @staticmethod
    def backward(ctx: Any, grad_patches: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        scatter = _ScatterPatches.apply if wants_graph() else scatter_patches
        return scatter(grad_patches, offsets, ctx.how, ctx.backend), None, None, None


def scatter_patches(grad_patches: Tensor, offsets: Tensor, how: Scattering, backend: str) -> Tensor:
    """The gradient of an image whose patches were cut by `backend`."""
    # An image in host memory gets its gradient there, even where its patches were read by a GPU.
    backend = backend if how.device == offsets.device else "cpu"
    grad_patches, offsets = grad_patches.to(how.device), offsets.to(how.device).long()
    if backend == "triton" and torch.compiler.is_compiling():
        from ats_kernels.patches.opaque import scatter

        shape, dtype, _, channels_last, padding, stds = how
        return scatter(grad_patches, offsets, shape, dtype, channels_last, padding, stds)
    return launch_scatter(grad_patches, offsets, how, backend)


class _ScatterPatches(torch.autograd.Function):
    """`scatter_patches` where it must be differentiable itself: it is linear, and cutting patches is its transpose."""

    @staticmethod
    def forward(ctx: Any, grad_patches: Tensor, offsets: Tensor, how: Scattering, backend: str) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.size, ctx.dtype = (grad_patches.shape[3], grad_patches.shape[4]), grad_patches.dtype
        ctx.padding, ctx.stds = how.padding, how.stds
        return scatter_patches(grad_patches, offsets, how, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        patches = extract_patches(grad, offsets, ctx.size, padding=ctx.padding, std=ctx.stds, dtype=ctx.dtype)
        return patches, None, None, None


def read(image: Tensor, places: Tensor, how: Reading) -> tuple[Tensor, Tensor]:
    """Patches and their offsets, by whichever implementation fits."""
    return read_by(_differentiably, image, places, how)


def _differentiably(image: Tensor, places: Tensor, how: Reading, backend: str) -> tuple[Tensor, Tensor]:
    if image.requires_grad and torch.is_grad_enabled():
        return _ExtractPatches.apply(image, places, how, backend)
    return _extract(image, places, how, backend)


def extract_patches(
    image: Tensor,
    offsets: Tensor,
    patch_size: int | tuple[int, int],
    *,
    padding: Padding = "zeros",
    mean: Normalisation = None,
    std: Normalisation = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Cut N patches out of each image.

    Args:
        image: (B, C, H, W) uint8, uint16, int16 or floating point (16 to 64 bits), any strides; on the offsets'
            device, or on the CPU while they are on a GPU: then only the patches cross the bus, read by the GPU itself
            from pinned memory, else cut on the CPU and copied (which makes the host wait for the offsets).
        offsets: (B, N, 2) int32 or int64, top-left pixels (y, x); they may lie outside the image.
        patch_size: pixels, an int or (ph, pw).
        padding: what is read outside: "zeros", after normalisation, or "edge", the nearest pixel.
        mean, std: a float, or one a channel: patches are (x − mean) / std. A uint8 image is scaled by 1/255 before,
            so that its mean and std are those of values in [0, 1]; no other is scaled.
        dtype: of the patches; float32 for whole numbers and the image's own otherwise.

    Returns:
        (B, N, C, ph, pw) patches on the offsets' device, differentiable in a floating-point image. In memory their
        channels come last, as networks in channels-last want them, if those of the image do.

    Raises:
        TypeError: an image or offsets of a dtype that does not fit, a `dtype` that is not floating point.
        ValueError: a wrong rank, channels that seem to come last, batches that differ, an empty image,
            patch_size < 1, unknown padding, a mean or std of the wrong length or a std that is not positive, devices
            that do not go together.

    Source: paper, eq. 3.
    """
    check_image(image)
    check_tensor("offsets", offsets)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets must be int32 or int64, got {offsets.dtype}; {advice.offsets(offsets)}")
    if offsets.ndim != 3 or offsets.shape[2] != 2:
        raise ValueError(f"offsets must be (B, N, 2), pairs (y, x), got {tuple(offsets.shape)}")
    if offsets.shape[0] != image.shape[0]:
        raise ValueError(f"image has batch size {image.shape[0]} but offsets have {offsets.shape[0]}; they must agree")
    return read(image, offsets, _check_reading(image, patch_size, padding, mean, std, dtype))[0]


def extract_cells(
    image: Tensor,
    indices: Tensor,
    grid_size: tuple[int, int],
    rows: tuple[int, int, int],
    columns: tuple[int, int, int],
    patch_size: int | tuple[int, int],
    *,
    padding: Padding = "zeros",
    mean: Normalisation = None,
    std: Normalisation = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Cut the patches of cells out of each image: `extract_patches` at offsets that it works out, in one launch.

    Args:
        image: as in `extract_patches`, on the indices' device or on the CPU.
        indices: (B, N) int64 or int32, flat cells of a row-major grid.
        grid_size: cells (gh, gw).
        rows: (a, b, d), d > 0: the patch of a cell in row i begins at pixel (a·i + b)/d, rounded half to even.
        columns: likewise along the width.
        patch_size, padding, mean, std, dtype: as in `extract_patches`.

    Returns:
        Patches (B, N, C, ph, pw), and their offsets (B, N, 2) int64 (y, x), both on the indices' device.

    Raises:
        TypeError: as `extract_patches`, and indices that are not integers.
        ValueError: as `extract_patches`, and indices that are not (B, N), or a d that is not positive.

    Source: paper, eq. 3.
    """
    check_image(image)
    return read_checked(image, indices, CellMap(grid_size, rows, columns), patch_size, padding, mean, std, dtype)


def read_checked(
    image: Tensor,
    indices: Tensor,
    cells: CellMap,
    patch_size: int | tuple[int, int],
    padding: Padding,
    mean: Normalisation,
    std: Normalisation,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """`extract_cells` of an image that is checked."""
    check_tensor("indices", indices)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices must be int32 or int64, got {indices.dtype}; convert them with indices.long()")
    if indices.ndim != 2 or indices.shape[0] != image.shape[0]:
        raise ValueError(f"indices must be (B, N) with B = {image.shape[0]} images, got {tuple(indices.shape)}")
    _, rows, columns = cells
    if rows[2] < 1 or columns[2] < 1:
        raise ValueError(f"rows and columns are (a, b, d) with d at least 1, got {rows} and {columns}")
    return read(image, indices, _check_reading(image, patch_size, padding, mean, std, dtype, cells))


def _check_reading(
    image: Tensor,
    patch_size: int | tuple[int, int],
    padding: Padding,
    mean: Normalisation,
    std: Normalisation,
    dtype: torch.dtype | None,
    cells: CellMap | None = None,
) -> Reading:
    size = check_pair("patch_size", patch_size)
    check_choice("padding", padding, PADDINGS)
    means, stds = check_normalisation(mean, std, image)
    return Reading(size, padding, means, stds, output_dtype(image, dtype), cells)
