"""One call of an implementation of reading patches, or of its transpose, outside of any graph or compiler."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ats_kernels.backend import backend_for, is_transformed
from ats_kernels.checks import bits, compute_dtype, is_channels_last, normalise
from ats_kernels.patches.cells import CellMap, cell_offsets_cpu, cell_offsets_ref
from ats_kernels.patches.cpu import extract_patches_cpu, scatter_patches_cpu
from ats_kernels.plausible import warn_of_bytes


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


Launcher = Callable[[Tensor, Tensor, Reading, str], tuple[Tensor, Tensor]]


def launch(image: Tensor, places: Tensor, how: Reading, backend: str) -> tuple[Tensor, Tensor]:
    """Patches and their offsets, by the kernels or the lean path."""
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


class Scattering(NamedTuple):
    """What the gradient of an image is made like, and how its patches were read."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    channels_last: bool
    padding: str
    stds: list[float] | None


def launch_scatter(grad_patches: Tensor, offsets: Tensor, how: Scattering, backend: str) -> Tensor:
    """The gradient of an image whose patches were cut by `backend`, on their device."""
    memory_format = torch.channels_last if how.channels_last else torch.contiguous_format
    grad_image = torch.empty(how.shape, dtype=how.dtype, device=how.device, memory_format=memory_format).zero_()
    scatter: Callable[..., None] = scatter_patches_cpu
    if backend == "triton":
        from ats_kernels.patches.triton import scatter_patches_triton

        scatter = scatter_patches_triton
    scatter(grad_patches, offsets, grad_image, padding=how.padding, stds=how.stds)
    return grad_image


def _backend(image: Tensor, places: Tensor, size: tuple[int, int], named: str) -> str:
    """The implementation that runs; "copy": the patches are cut on the CPU and copied to the places' device."""
    if image.device == places.device:
        if is_transformed():
            return "reference"
        backend = backend_for(image)
        if backend != "cpu":
            return backend
        # The lean path looks at values, which a compiler cannot trace; and it fuses the reference into one loop.
        larger = size[0] > image.shape[2] or size[1] > image.shape[3]
        return "reference" if larger or torch.compiler.is_compiling() else backend
    if image.device.type != "cpu" or places.device.type == "meta":
        raise ValueError(f"image is on {image.device} but {named} are on {places.device}; move one to the other")
    if torch.compiler.is_compiling():  # it cannot see whether memory is pinned: the operator looks when it runs
        return "triton" if backend_for(places) == "triton" else "copy"
    return "triton" if backend_for(places) == "triton" and image.is_pinned() else "copy"


def read_by(launcher: Launcher, image: Tensor, places: Tensor, how: Reading) -> tuple[Tensor, Tensor]:
    """Patches and their offsets, by whichever implementation fits; `launcher` calls all but the reference."""
    backend = _backend(image, places, how.size, "offsets" if how.cells is None else "indices")
    if backend == "copy":
        patches, offsets = read_by(launcher, image, places.cpu(), how)
        return patches.to(places.device, non_blocking=True), offsets.to(places.device, non_blocking=True)
    if backend == "reference":
        offsets = places.long() if how.cells is None else cell_offsets_ref(places, how.cells)
        size, padding, means, stds, dtype, _ = how
        patches = extract_patches_ref(image, offsets, size, padding=padding, means=means, stds=stds, dtype=dtype)
    else:
        patches, offsets = launcher(image, places, how, backend)
    warn_of_bytes(image, how.means, how.stds, patches)
    return patches, offsets
