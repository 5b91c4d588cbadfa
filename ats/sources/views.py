"""The low-resolution view of an image on disk, a strip at a time: memory does not grow with the image."""

import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from ats.sources.image_source import ImageSource, check_mpp
from ats.sources.reading import Box, read_boxes
from ats.sources.view_cache import cached_view
from ats_kernels import area_downsample
from ats_kernels.checks import check_number, check_pair

STRIP_BYTES = 32 << 20
"""The most that is read at once, and that the means of a strip's rows take."""

_THREADS = 4  # that read parts of a strip

_TILE_ROWS = 1024
"""Rows of a strip of a wide image, which is read in blocks: some tiles high, so that few are decoded twice."""


def read_view(
    source: ImageSource,
    *,
    scale: float | None = None,
    mpp: float | tuple[float, float] | None = None,
    size: int | tuple[int, int] | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Tensor:
    """Read an image's view, the mean over each of its pixels' area.

    It is `ats.area_downsample` of the coarsest level that is not coarser than asked: the same as of the image in memory
    where the view's sides divide that level's, and close to it elsewhere, as bins that begin amid a level's pixel take
    all of that pixel. Only one of scale, mpp and size is given.

    Args:
        source: the image.
        scale: of the view's sides to the image's, above 0 and at most 1.
        mpp: micrometres a pixel of the view, a number or (y, x); no finer than the image's.
        size: pixels of the view, an int or (h, w).
        cache: folder that keeps views from run to run; made if it is missing. A file of it is told by the image's
            place, size and time, and written whole or not at all; a damaged one is made anew.

    Returns:
        (C, h, w), float32 (float64 of such an image); bytes as fractions of 255, other numbers in their own unit.

    Raises:
        ValueError: none or several of scale, mpp and size, a view finer than the image, an image without mpp, a
            damaged file, or a cache for a source without fingerprint.
        OSError: the cache's disk is full, or it may not be read or written.
    """
    height, width = view_size(source, scale=scale, mpp=mpp, size=size)
    level = coarsest_level(source, height, width)
    if cache is None:
        return _average(source, level, height, width)
    return cached_view(cache, source, level, (height, width), lambda: _average(source, level, height, width))


def view_size(
    source: ImageSource,
    *,
    scale: float | None = None,
    mpp: float | tuple[float, float] | None = None,
    size: int | tuple[int, int] | None = None,
) -> tuple[int, int]:
    """The pixels (h, w) of the view that `read_view` reads; arguments and errors are its own."""
    full = source.levels[0]
    if sum(option is not None for option in (scale, mpp, size)) != 1:
        raise ValueError(f"give one of scale, mpp and size, got {scale=}, {mpp=}, {size=}")
    if size is not None:
        height, width = check_pair("size", size)
        if height > full.height or width > full.width:
            raise ValueError(
                f"a view of {height}×{width} pixels is larger than {source.name}, {full.height}×{full.width} (height × "
                "width); a view is the image shrunk"
            )
        return height, width
    if mpp is not None:
        wanted, own = check_mpp(mpp), source.mpp
        if own is None:
            raise ValueError(
                f"{source.name} does not say how many micrometres a pixel is: open it with ats.open_image(path, "
                "mpp=…), or ask for a scale or size"
            )
        assert wanted is not None
        scales = (own[0] / wanted[0], own[1] / wanted[1])
        if max(scales) > 1 + 1e-9:
            raise ValueError(f"a view of {mpp} micrometres a pixel is finer than {source.name} itself, {own} (y, x)")
    else:
        scale = check_number("scale", scale)
        if not 0 < scale <= 1:
            raise ValueError(f"scale must be above 0 and at most 1, the view's side to the image's; got {scale}")
        scales = (scale, scale)
    sides = zip((full.height, full.width), scales, strict=True)
    height, width = (max(1, min(side, round(side * ratio))) for side, ratio in sides)
    return height, width


def coarsest_level(source: ImageSource, height: int, width: int) -> int:
    """The coarsest level that has at least as many pixels as (height, width) each way."""
    fine = [i for i, level in enumerate(source.levels) if level.height >= height and level.width >= width]
    return fine[-1] if fine else 0


def _average(source: ImageSource, level: int, height: int, width: int) -> Tensor:
    """The whole of a level, shrunk to (C, height, width)."""
    size = source.levels[level]
    dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
    view = torch.empty(source.channels, height, width, dtype=dtype, device="cpu")
    for first, last in _strips(source, size.height, size.width, height):
        begin, end = _bin(first, size.height, height)[0], _bin(last - 1, size.height, height)[1]
        columns = max(1, STRIP_BYTES // (_THREADS * source.channels * source.dtype.itemsize * (end - begin)))
        lefts = range(0, size.width, columns)
        boxes = [Box(source, level, begin, left, end - begin, min(columns, size.width - left)) for left in lefts]
        aligned = first * size.height % height == last * size.height % height == 0
        if len(boxes) <= _THREADS and aligned:  # the strip's bins are those of an image of its own
            strip = _floating(torch.cat(read_boxes(boxes, threads=_THREADS), 2))
            view[:, first:last] = area_downsample(strip[None], (last - first, width), dtype=dtype)[0]
            continue
        means = torch.empty(source.channels, last - first, size.width, dtype=dtype, device="cpu")
        for some in range(0, len(boxes), _THREADS):
            now = boxes[some : some + _THREADS]
            for box, pixels in zip(now, read_boxes(now, threads=_THREADS), strict=True):
                block = _floating(pixels)
                for row in range(first, last):
                    top, bottom = _bin(row, size.height, height)
                    weight = (bottom - top) * (255 if block.dtype == torch.uint8 else 1)
                    part = block[:, top - begin : bottom - begin]
                    means[:, row - first, box.left : box.left + box.width] = part.sum(1, dtype=dtype).div_(weight)
        view[:, first:last] = area_downsample(means[None], (last - first, width), dtype=dtype)[0]
    return view


def _bin(row: int, rows: int, height: int) -> tuple[int, int]:
    """The rows of an image [top, bottom) that a row of its view is the mean of; neighbours may share one."""
    return row * rows // height, -(-(row + 1) * rows // height)


def _strips(source: ImageSource, rows: int, columns: int, height: int) -> Iterator[tuple[int, int]]:
    """Output rows [first, last) of each strip: as many as can be read at once, or some tiles' if these are fewer."""
    row_bytes = source.channels * source.dtype.itemsize * columns
    by_reading = STRIP_BYTES * height // (row_bytes * rows)
    by_tiles = _TILE_ROWS * height // rows
    by_means = STRIP_BYTES // (4 * source.channels * columns)
    step = max(1, min(max(by_reading, by_tiles), by_means))
    period = height // math.gcd(rows, height)  # output rows after which bins begin with whole pixels again
    step -= step % period if step > period else 0
    for first in range(0, height, step):
        yield first, min(first + step, height)


def _floating(box: Tensor) -> Tensor:
    """16-bit integers as float32, which holds each of them; what `area_downsample` takes as it is."""
    return box.float() if box.dtype in (torch.uint16, torch.int16) else box
