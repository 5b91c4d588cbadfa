"""The kernels' launches as operators that `torch.compile` does not look into.

Launchers choose tiles by the numbers of a shape, which a compiler that traces sizes as symbols does not have, and look
whether memory is pinned. Eager calls do without these operators, which take the host longer than the launch.
"""

import torch
from torch import Tensor

from ats_kernels.patches.cells import CellMap
from ats_kernels.patches.launch import Reading, Scattering, empty_patches, launch, launch_scatter, read_by


@torch.library.custom_op(
    "ats_kernels::extract_patches",
    mutates_args=(),
    schema="(Tensor image, Tensor places, SymInt[] size, str padding, float[]? means, float[]? stds, ScalarType dtype, "
    "SymInt[]? cells) -> (Tensor, Tensor)",
)
def _extract(
    image: Tensor,
    places: Tensor,
    size: list[int],
    padding: str,
    means: list[float] | None,
    stds: list[float] | None,
    dtype: torch.dtype,
    cells: list[int] | None,
) -> tuple[Tensor, Tensor]:
    cell_map = None
    if cells is not None:
        a, b, c, d, e, f, *grid_size = cells
        cell_map = CellMap((grid_size[0], grid_size[1]), (a, b, c), (d, e, f))
    how = Reading((size[0], size[1]), padding, means, stds, dtype, cell_map)
    patches, offsets = read_by(launch, image.detach(), places, how)
    return patches, offsets.to(torch.int64, copy=True) if offsets is places else offsets


@_extract.register_fake
def _(
    image: Tensor,
    places: Tensor,
    size: list[int],
    padding: str,
    means: list[float] | None,
    stds: list[float] | None,
    dtype: torch.dtype,
    cells: list[int] | None,
) -> tuple[Tensor, Tensor]:
    offsets = torch.empty((*places.shape[:2], 2), dtype=torch.int64, device=places.device)
    return empty_patches(image, offsets, (size[0], size[1]), dtype), offsets


def extract(
    image: Tensor,
    places: Tensor,
    size: tuple[int, int],
    padding: str,
    means: list[float] | None,
    stds: list[float] | None,
    dtype: torch.dtype,
    cells: CellMap | None,
) -> tuple[Tensor, Tensor]:
    """Patches and their offsets."""
    numbers = None if cells is None else [*cells.rows, *cells.columns, *cells.grid_size]
    patches, offsets = _extract(image, places, list(size), padding, means, stds, dtype, numbers)
    return patches, offsets


@torch.library.custom_op(
    "ats_kernels::scatter_patches",
    mutates_args=(),
    schema="(Tensor grad_patches, Tensor offsets, SymInt[] shape, ScalarType dtype, bool channels_last, str padding, "
    "float[]? stds) -> Tensor",
)
def scatter(
    grad_patches: Tensor,
    offsets: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    channels_last: bool,
    padding: str,
    stds: list[float] | None,
) -> Tensor:
    """The gradient of the image."""
    how = Scattering(shape, dtype, grad_patches.device, channels_last, padding, stds)
    return launch_scatter(grad_patches, offsets.long(), how, "triton")


@scatter.register_fake
def _(
    grad_patches: Tensor,
    offsets: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    channels_last: bool,
    padding: str,
    stds: list[float] | None,
) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=grad_patches.device, memory_format=memory_format)
