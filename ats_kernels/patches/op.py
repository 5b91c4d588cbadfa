"""Cut patches out of full-resolution images.

``patches[b, n, c, y, x] = image[b, c, offsets[b, n, 0] + y, offsets[b, n, 1] + x]``: T(x, i) of the paper
(eq. 3). Only the patches are read. A patch may lie partly or wholly outside its image: there it reads zeros,
put in after normalisation, or the nearest pixel.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ats_kernels import advice
from ats_kernels.backend import backend_for, is_transformed, wants_graph
from ats_kernels.checks import (
    Normalisation,
    bits,
    check_choice,
    check_image,
    check_normalisation,
    check_pair,
    check_tensor,
    compute_dtype,
    is_channels_last,
    normalise,
    output_dtype,
)
from ats_kernels.patches.cells import CellMap, cell_offsets_cpu, cell_offsets_ref
from ats_kernels.patches.cpu import extract_patches_cpu, scatter_patches_cpu
from ats_kernels.plausible import warn_of_bytes

PADDINGS = ("zeros", "edge")


def extract_patches_ref(
    image: Tensor,  # (B, C, H, W)
    offsets: Tensor,  # (B, N, 2)
    patch_size: tuple[int, int],
    *,
    padding: str = "zeros",
    means: list[float] | None = None,
    stds: list[float] | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """The op in plain PyTorch, differentiable in a floating-point image. Arguments as `extract_patches` passes."""
    batch, _, height, width = image.shape
    # Farther out than this reads the same, and does not overflow.
    top, left = offsets[..., 0, None].clamp(-patch_size[0], height), offsets[..., 1, None].clamp(-patch_size[1], width)
    rows = top + torch.arange(patch_size[0], device=offsets.device)  # (B, N, ph)
    columns = left + torch.arange(patch_size[1], device=offsets.device)  # (B, N, pw)
    inside = ((rows >= 0) & (rows < height)).unsqueeze(-1) & ((columns >= 0) & (columns < width)).unsqueeze(-2)
    which = torch.arange(batch, device=offsets.device).view(-1, 1, 1, 1)
    # Indexing around the channels puts them last: (B, N, ph, pw, C).
    rows, columns = rows.clamp(0, height - 1).unsqueeze(-1), columns.clamp(0, width - 1).unsqueeze(-2)
    pixels = bits(image)[which, :, rows, columns]
    if image.dtype == torch.uint16:
        pixels = pixels.view(image.dtype)
    patches = pixels.movedim(-1, 2).to(compute_dtype(image.dtype, dtype))  # (B, N, C, ph, pw)
    patches = normalise(patches, means, stds, channel_dim=2, is_byte=image.dtype == torch.uint8)
    if padding == "zeros":
        patches = patches.masked_fill(~inside.unsqueeze(2), 0.0)
    patches = patches.to(dtype)
    if is_channels_last(image):
        return patches.movedim(2, -1).contiguous().movedim(-1, 2)
    return patches.contiguous()


def empty_patches(image: Tensor, offsets: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """What patches (B, N, C, ph, pw) are written to, with the channels last in memory if the image has them so."""
    shape = (*offsets.shape[:2], image.shape[1], *size)  # (B, N, C, ph, pw)
    if is_channels_last(image):
        return torch.empty((*shape[:2], *size, shape[2]), dtype=dtype, device=offsets.device).movedim(-1, 2)
    return torch.empty(shape, dtype=dtype, device=offsets.device)


class Reading(NamedTuple):
    """How patches are read; `cells` where their places are cells of a grid, not offsets."""

    size: tuple[int, int]
    padding: str
    means: list[float] | None
    stds: list[float] | None
    dtype: torch.dtype
    cells: CellMap | None = None


def _extract(image: Tensor, places: Tensor, how: Reading, backend: str) -> tuple[Tensor, Tensor]:
    """Patches and their offsets, by the kernels or the lean path."""
    if backend == "triton" and torch.compiler.is_compiling():
        from ats_kernels.patches.opaque import extract

        return extract(image, places, *how)
    cells, indices = how.cells, None
    if backend == "triton":
        from ats_kernels.patches.triton import extract_patches_triton

        offsets = places
        if cells is not None:
            indices, offsets = places, torch.empty((*places.shape, 2), dtype=torch.int64, device=places.device)
        patches = empty_patches(image, offsets, how.size, how.dtype)
        extract_patches_triton(
            image, offsets, patches, indices=indices, cells=cells, padding=how.padding, means=how.means, stds=how.stds
        )
    else:
        offsets = places.long() if cells is None else cell_offsets_cpu(places, cells)
        patches = empty_patches(image, offsets, how.size, how.dtype)
        extract_patches_cpu(image, offsets, patches, padding=how.padding, means=how.means, stds=how.stds)
    return patches, offsets


class ImageLike(NamedTuple):
    """What the gradient of an image is made like."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    channels_last: bool


class _ExtractPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, places: Tensor, how: Reading, backend: str) -> tuple[Tensor, Tensor]:
        patches, offsets = _extract(image, places, how, backend)
        ctx.save_for_backward(offsets)
        ctx.image = ImageLike(image.shape, image.dtype, image.device, is_channels_last(image))
        ctx.padding, ctx.stds, ctx.backend = how.padding, how.stds, backend
        ctx.mark_non_differentiable(offsets)
        return patches, offsets

    @staticmethod
    def backward(ctx: Any, grad_patches: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        scatter = _ScatterPatches.apply if wants_graph() else scatter_patches
        return scatter(grad_patches, offsets, ctx.image, ctx.padding, ctx.stds, ctx.backend), None, None, None


def scatter_patches(
    grad_patches: Tensor,
    offsets: Tensor,
    image: ImageLike,
    padding: str,
    stds: list[float] | None,
    backend: str,
) -> Tensor:
    """The gradient of an image whose patches were cut by `backend`."""
    # An image in host memory gets its gradient there, even where its patches were read by a GPU.
    backend = backend if image.device == offsets.device else "cpu"
    grad_patches, offsets = grad_patches.to(image.device), offsets.to(image.device).long()
    if backend == "triton" and torch.compiler.is_compiling():
        from ats_kernels.patches.opaque import scatter as scatter_opaque

        shape, dtype, _, channels_last = image
        return scatter_opaque(grad_patches, offsets, shape, dtype, channels_last, padding, stds)
    memory_format = torch.channels_last if image.channels_last else torch.contiguous_format
    grad_image = torch.empty(image.shape, dtype=image.dtype, device=image.device, memory_format=memory_format).zero_()
    scatter: Callable[..., None] = scatter_patches_cpu
    if backend == "triton":
        from ats_kernels.patches.triton import scatter_patches_triton

        scatter = scatter_patches_triton
    scatter(grad_patches, offsets, grad_image, padding=padding, stds=stds)
    return grad_image


class _ScatterPatches(torch.autograd.Function):
    """`scatter_patches` where it must be differentiable itself: it is linear, and cutting patches is its transpose."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_patches: Tensor,
        offsets: Tensor,
        image: ImageLike,
        padding: str,
        stds: list[float] | None,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.size, ctx.dtype = (grad_patches.shape[3], grad_patches.shape[4]), grad_patches.dtype
        ctx.padding, ctx.stds = padding, stds
        return scatter_patches(grad_patches, offsets, image, padding, stds, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        patches = extract_patches(grad, offsets, ctx.size, padding=ctx.padding, std=ctx.stds, dtype=ctx.dtype)
        return patches, None, None, None, None, None


def _backend(image: Tensor, places: Tensor, size: tuple[int, int], named: str) -> str:
    """The implementation that runs; "copy": the patches are cut on the CPU and copied to the places' device."""
    if image.device == places.device:
        backend = "reference" if is_transformed() else backend_for(image)
        # The lean path looks at values, which a compiler cannot trace; and it fuses the reference into one loop.
        larger = size[0] > image.shape[2] or size[1] > image.shape[3]
        return "reference" if backend == "cpu" and (larger or torch.compiler.is_compiling()) else backend
    if image.device.type != "cpu" or places.device.type == "meta":
        raise ValueError(f"image is on {image.device} but {named} are on {places.device}; move one to the other")
    if torch.compiler.is_compiling():  # it cannot see whether memory is pinned: the operator looks when it runs
        return "triton" if backend_for(places) == "triton" else "copy"
    return "triton" if backend_for(places) == "triton" and image.is_pinned() else "copy"


def read(image: Tensor, places: Tensor, how: Reading) -> tuple[Tensor, Tensor]:
    """Patches and their offsets, by whichever implementation fits."""
    backend = _backend(image, places, how.size, "offsets" if how.cells is None else "indices")
    if backend == "copy":
        patches, offsets = read(image, places.cpu(), how)
        return patches.to(places.device, non_blocking=True), offsets.to(places.device, non_blocking=True)
    if backend == "reference":
        offsets = places.long() if how.cells is None else cell_offsets_ref(places, how.cells)
        size, padding, means, stds, dtype, _ = how
        patches = extract_patches_ref(image, offsets, size, padding=padding, means=means, stds=stds, dtype=dtype)
    elif image.requires_grad and torch.is_grad_enabled():
        patches, offsets = _ExtractPatches.apply(image, places, how, backend)
    else:
        patches, offsets = _extract(image, places, how, backend)
    warn_of_bytes(image, how.means, how.stds, patches)
    return patches, offsets


def extract_patches(
    image: Tensor,
    offsets: Tensor,
    patch_size: int | tuple[int, int],
    *,
    padding: str = "zeros",
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
    padding: str = "zeros",
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
    check_tensor("indices", indices)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices must be int32 or int64, got {indices.dtype}; convert them with indices.long()")
    if indices.ndim != 2 or indices.shape[0] != image.shape[0]:
        raise ValueError(f"indices must be (B, N) with B = {image.shape[0]} images, got {tuple(indices.shape)}")
    if rows[2] < 1 or columns[2] < 1:
        raise ValueError(f"rows and columns are (a, b, d) with d at least 1, got {rows} and {columns}")
    how = _check_reading(image, patch_size, padding, mean, std, dtype)
    return read(image, indices, how._replace(cells=CellMap(grid_size, rows, columns)))


def _check_reading(
    image: Tensor,
    patch_size: int | tuple[int, int],
    padding: str,
    mean: Normalisation,
    std: Normalisation,
    dtype: torch.dtype | None,
) -> Reading:
    size = check_pair("patch_size", patch_size)
    check_choice("padding", padding, PADDINGS)
    means, stds = check_normalisation(mean, std, image)
    return Reading(size, padding, means, stds, output_dtype(image, dtype))
