"""Read boxes of images at a scale, each view pixel the mean over its area: the one way that nested sampling looks.

Images are a batch in memory, or a sequence of tensors and sources of any sizes. A box may reach out of its image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ats.batches import Images, size_of
from ats.sources import ImageSource, read_boxes
from ats_kernels import area_downsample, extract_patches
from ats_kernels.checks import Normalisation, Padding, compute_dtype, output_dtype

AT_ONCE = 64 << 20
"""Bytes of full resolution that are held at once to make views of."""


class Reading(NamedTuple):
    """How pixels are read: as in `ats.read_patches`."""

    padding: Padding = "zeros"
    mean: Normalisation = None
    std: Normalisation = None
    dtype: torch.dtype | None = None


def host_tensor(values: object, device: torch.device) -> Tensor:
    """Whole numbers of the host as int64 on a device, without waiting for it."""
    return torch.tensor(values, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def read_regions(images: Images, origins: Tensor, size: tuple[int, int], scale: int, how: Reading) -> Tensor:
    """Views of M boxes of each image.

    Args:
        images: B of them.
        origins: (B, M, 2) int64, top-left pixels (y, x) at full resolution; boxes may lie outside in part or wholly.
        size: of a box, pixels (h, w) at full resolution, multiples of the scale.
        scale: pixels along a side of what becomes a pixel of the view; 1 reads patches.
        how: padding and what values become.

    Returns:
        (B, M, C, h / scale, w / scale), on the device of `origins`.
    """
    if isinstance(images, Tensor):
        return _read_tensor(images, origins, size, scale, how)
    read: list[Tensor | None] = [
        _read_tensor(image[None], origins[i : i + 1], size, scale, how) if isinstance(image, Tensor) else None
        for i, image in enumerate(images)
    ]
    for i, views in _read_sources(images, origins, size, scale, how).items():
        read[i] = views
    return torch.cat([views for views in read if views is not None])


def _read_tensor(image: Tensor, origins: Tensor, size: tuple[int, int], scale: int, how: Reading) -> Tensor:
    if scale == 1:
        return extract_patches(image, origins, size, **how._asdict())
    fine = compute_dtype(image.dtype)
    box_bytes = image.shape[0] * image.shape[1] * size[0] * size[1] * fine.itemsize
    parts = [
        _shrink(extract_patches(image, some, size, **how._replace(dtype=fine)._asdict()), scale)
        for some in origins.split(max(1, AT_ONCE // box_bytes), dim=1)
    ]
    return torch.cat(parts, dim=1).to(output_dtype(image, how.dtype))


def _shrink(boxes: Tensor, scale: int) -> Tensor:
    """Boxes (B, M, C, h, w) -> the means of scale×scale pixels each."""
    size = boxes.shape[-2] // scale, boxes.shape[-1] // scale
    return area_downsample(boxes.flatten(0, 1), size).unflatten(0, tuple(boxes.shape[:2]))


def _read_sources(
    images: Sequence[Tensor | ImageSource], origins: Tensor, size: tuple[int, int], scale: int, how: Reading
) -> dict[int, Tensor]:
    """The views (1, M, C, h, w) of those images that are sources, by their numbers; all boxes in one call."""
    boxes: list[tuple[ImageSource, int, int, int, int, int]] = []
    plan: list[tuple[int, int, list[tuple[int, int]]]] = []  # image, downsample, where each box begins in what is read
    corners = origins.tolist()
    for number, source in enumerate(images):
        if isinstance(source, Tensor):
            continue
        level, down = _level(source, [scale, *size, *(side for corner in corners[number] for side in corner)])
        if how.padding == "edge" and _reach_out(corners[number], size, size_of(source)):
            level, down = 0, 1  # the nearest pixel is one of full resolution
        full = source.levels[level]
        begins = []
        for corner in corners[number]:
            (top, height), (left, width) = (
                _inside(begin // down, side // down, limit)
                for begin, side, limit in zip(corner, size, (full.height, full.width), strict=True)
            )
            boxes.append((source, level, top, left, height, width))
            begins.append((corner[0] // down - top, corner[1] // down - left))
        plan.append((number, down, begins))
    pixels = iter(read_boxes(boxes))
    views = {}
    for number, down, begins in plan:
        parts = [next(pixels) for _ in begins]
        views[number] = _pad_and_shrink(parts, begins, (size[0] // down, size[1] // down), scale // down, how).to(
            origins.device
        )
    return views


def _reach_out(corners: list[tuple[int, int]], size: tuple[int, int], image: tuple[int, int]) -> bool:
    return any(corner[axis] < 0 or corner[axis] + size[axis] > image[axis] for corner in corners for axis in (0, 1))


def _inside(begin: int, side: int, limit: int) -> tuple[int, int]:
    """The first pixel and the pixels of what is inside of an axis: one at least, of which edges are made."""
    first = min(max(begin, 0), limit - 1)
    return first, max(min(begin + side, limit), first + 1) - first


def _pad_and_shrink(
    parts: list[Tensor], begins: list[tuple[int, int]], size: tuple[int, int], scale: int, how: Reading
) -> Tensor:
    """What was read, M of (C, h, w) each, as views (1, M, C, h / scale, w / scale) of boxes that begin there."""
    most = max(1, AT_ONCE // (4 * parts[0].shape[0] * size[0] * size[1]))
    if len({part.shape for part in parts}) > 1:  # some reach out of the image
        most = 1
    if len(parts) > most:
        groups = [slice(first, first + most) for first in range(0, len(parts), most)]
        return torch.cat([_pad_and_shrink(parts[some], begins[some], size, scale, how) for some in groups], dim=1)
    origins = torch.tensor(begins, device="cpu")[:, None]  # (M, 1, 2)
    return _read_tensor(torch.stack(parts), origins, size, scale, how).transpose(0, 1)


def _level(source: ImageSource, numbers: list[int]) -> tuple[int, int]:
    """The coarsest level of which all numbers are whole pixels, and its downsample; others would be resampled."""
    full = source.levels[0]
    for index in reversed(range(1, len(source.levels))):
        level = source.levels[index]
        down = round(full.height / level.height)
        whole = all(
            side in (whole // down, -(-whole // down))
            for whole, side in ((full.height, level.height), (full.width, level.width))
        )
        if whole and all(number % down == 0 for number in numbers):
            return index, down
    return 0, 1


def read_views(images: Images, scale: int, how: Reading) -> Tensor | list[Tensor]:
    """The whole of each image, in pixels of scale×scale, what is missing to a whole pixel padded.

    Returns:
        (B, C, ⌈H / scale⌉, ⌈W / scale⌉), or a list of (C, h, w) where images are a sequence.
    """
    if not isinstance(images, Tensor):
        return [
            _read_whole(image[None] if isinstance(image, Tensor) else [image], size_of(image), scale, how)[0]
            for image in images
        ]
    size = (images.shape[2], images.shape[3])
    if size[0] % scale == 0 and size[1] % scale == 0:
        target = size[0] // scale, size[1] // scale
        return area_downsample(images, target, mean=how.mean, std=how.std, dtype=how.dtype)
    return _read_whole(images, size, scale, how)


def _downsample(images: Images, size: tuple[int, int], padded: tuple[int, int], scale: int, how: Reading) -> int:
    """By how much what is read of whole images is shrunk already, in the file."""
    if isinstance(images, Tensor) or (how.padding == "edge" and padded != size):
        return 1
    return min(1 if isinstance(image, Tensor) else _level(image, [scale, *padded])[1] for image in images)


def _read_whole(images: Images, size: tuple[int, int], scale: int, how: Reading) -> Tensor:
    """The views (B, C, h, w) of images of one size, a strip at a time."""
    device = images.device if isinstance(images, Tensor) else torch.device("cpu")
    rows, columns = -(-size[0] // scale), -(-size[1] // scale)
    channels = images.shape[1] if isinstance(images, Tensor) else images[0].channels  # type: ignore[union-attr]
    read = scale // _downsample(images, size, (rows * scale, columns * scale), scale, how)  # pixels along a view pixel
    strip = max(1, AT_ONCE // (4 * channels * read * read * columns))  # rows of the view
    parts = []
    for first in range(0, rows, strip):
        height = min(strip, rows - first)
        origins = torch.tensor([first * scale, 0], device=device).expand(len(images), 1, 2)
        parts.append(read_regions(images, origins, (height * scale, columns * scale), scale, how)[:, 0])
    return torch.cat(parts, dim=-2)
