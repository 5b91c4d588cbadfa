"""Read the patches of cells from a batch whose images differ in size, in memory or on disk.

Tensors are read by the kernels, one after the other, and gradients go through. Of sources all boxes of a batch are read
at once, by a few threads, and come to the network as the kernels bring a tensor's pixels there: the same numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import ats_kernels
from ats.batches import Size, Sizes, each_size, size_of
from ats.grid import Placement, make_grid
from ats.sources.image_source import ImageSource
from ats.sources.reading import Box, read_boxes
from ats_kernels.checks import Normalisation, Padding, bits, check_choice, check_normalisation, output_dtype
from ats_kernels.patches.launch import Reading
from ats_kernels.patches.op import PADDINGS, read


def read_cells(
    images: Sequence[Tensor | ImageSource],
    indices: Tensor,
    grid_size: Size,
    patch_size: Size,
    *,
    grid_sizes: Sequence[Size] | None = None,
    view_size: Sizes | None = None,
    receptive_field: int | Placement = 0,
    padding: Padding = "zeros",
    mean: Normalisation = None,
    std: Normalisation = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The patches (B, N, C, ph, pw) of cells (B, N) of a common grid (gh, gw), and their offsets (B, N, 2).

    Args:
        images: tensors (C, H, W) and sources, which agree in channels and dtype.
        grid_sizes: of each image's own cells, the top left part of the common grid; None: all of it.
        view_size: pixels (h, w) of the views, for all or one an image.
        patch_size, receptive_field, padding, mean, std, dtype: as in `ats.read_patches`.
    """
    batch = len(images)
    own = each_size("grid_sizes", grid_size if grid_sizes is None else grid_sizes, batch)
    views = [None] * batch if view_size is None else each_size("view_size", view_size, batch)
    grids = [
        make_grid(cells, size_of(image), view, receptive_field)
        for cells, image, view in zip(own, images, views, strict=True)
    ]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    stored = [number for number, image in enumerate(images) if not isinstance(image, Tensor)]
    if stored:
        host = indices[stored].cpu() if len(stored) < batch else indices.cpu()
        offsets = torch.stack(
            [
                grids[number].offsets(_own_cells(row, grid_size, own[number]), patch_size)
                for number, row in zip(stored, host, strict=True)
            ]
        )
        sources = [images[number] for number in stored]
        check_choice("padding", padding, PADDINGS)
        patches = _read_sources(sources, offsets, patch_size, padding, mean, std, dtype, indices.device)  # type: ignore[arg-type]
        if len(stored) == batch:
            return patches, offsets.to(indices.device)
        found |= dict(zip(stored, zip(patches, offsets.to(indices.device), strict=True), strict=True))
    for number, image in enumerate(images):
        if isinstance(image, Tensor):
            cells = _own_cells(indices[number], grid_size, own[number])
            rows, columns = grids[number].affine(patch_size)
            some, where = ats_kernels.extract_cells(
                image[None], cells[None], own[number], rows, columns, patch_size,
                padding=padding, mean=mean, std=std, dtype=dtype,
            )  # fmt: skip
            found[number] = some[0], where[0]
    parts = [found[number] for number in range(batch)]
    return torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])


def _own_cells(indices: Tensor, grid_size: Size, own: Size) -> Tensor:
    """Flat cells of the common grid as those of an image's own; −1, where nothing could be drawn, stays."""
    if grid_size[1] == own[1]:
        return indices
    return torch.where(indices < 0, indices, indices // grid_size[1] * own[1] + indices % grid_size[1])


def _read_sources(
    sources: Sequence[ImageSource],
    offsets: Tensor,  # (S, N, 2) in host memory
    patch_size: Size,
    padding: Padding,
    mean: Normalisation,
    std: Normalisation,
    dtype: torch.dtype | None,
    device: torch.device,
) -> Tensor:
    """Patches (S, N, C, ph, pw) of level 0 at given pixels, each distinct one read once."""
    places = [(s, top, left) for s, row in enumerate(offsets.tolist()) for top, left in row]  # S·N of them
    boxes = {place: _nearest_box(sources[place[0]], *place[1:], patch_size) for place in dict.fromkeys(places)}
    read_once = dict(zip(boxes, read_boxes(boxes.values()), strict=True))
    first = sources[0]
    raw = torch.empty(len(places), first.channels, *patch_size, dtype=first.dtype, device="cpu")
    for number, place in enumerate(places):
        box, pixels = boxes[place], read_once[place]
        if pixels.shape != (first.channels, box.height, box.width) or pixels.dtype != first.dtype:
            raise ValueError(
                f"{box.source.name} gave {tuple(pixels.shape)} of {pixels.dtype} for a box of {box.height}×{box.width} "
                f"pixels; its read must give ({first.channels}, {box.height}, {box.width}) of {first.dtype}"
            )
        pixels = bits(pixels)
        if (box.height, box.width) != patch_size:
            rows = (torch.arange(patch_size[0], device="cpu") + place[1] - box.top).clamp(0, box.height - 1)
            columns = (torch.arange(patch_size[1], device="cpu") + place[2] - box.left).clamp(0, box.width - 1)
            pixels = pixels[:, rows.unsqueeze(-1), columns]
        bits(raw)[number] = pixels
    raw = raw.to(device)  # as few bytes as there are
    means, stds = check_normalisation(mean, std, raw)
    how = Reading(patch_size, padding, means, stds, output_dtype(raw, dtype))
    patches, _ = read(raw, torch.zeros(len(raw), 1, 2, dtype=torch.int64, device=device), how)  # (S·N, 1, C, ph, pw)
    patches = patches.squeeze(1).unflatten(0, tuple(offsets.shape[:2]))
    if padding == "zeros" and any((box.height, box.width) != patch_size for box in boxes.values()):
        patches = patches.masked_fill(~_inside(sources, offsets, patch_size).unsqueeze(2).to(device), 0.0)
    return patches


def _nearest_box(source: ImageSource, top: int, left: int, patch_size: Size) -> Box:
    """The part of a patch that is in the image, or where nothing is the pixels next to it."""
    height, width = size_of(source)
    rows, columns = _nearest(height, top, patch_size[0]), _nearest(width, left, patch_size[1])
    return Box(source, 0, rows[0], columns[0], rows[1], columns[1])


def _nearest(size: int, begin: int, length: int) -> tuple[int, int]:
    first = min(max(begin, 0), size - 1)
    return first, max(min(begin + length, size), first + 1) - first


def _inside(sources: Sequence[ImageSource], offsets: Tensor, patch_size: Size) -> Tensor:
    """Which pixels (S, N, ph, pw) of patches are in their images."""
    sizes = torch.tensor([size_of(source) for source in sources], device=offsets.device)  # (S, 2)
    axes = []
    for axis in (0, 1):
        pixel = offsets[..., axis, None] + torch.arange(patch_size[axis], device=offsets.device)  # (S, N, p)
        axes.append((pixel >= 0) & (pixel < sizes[:, axis].view(-1, 1, 1)))
    return axes[0].unsqueeze(-1) & axes[1].unsqueeze(-2)
