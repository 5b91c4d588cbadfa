"""The GPU path of `area_downsample`: it launches the Triton kernels, in tiles that fit ratio and memory order."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ats_kernels.backend import device_guard
from ats_kernels.checks import compute_dtype, is_channels_last
from ats_kernels.device import fits, padded
from ats_kernels.views.kernels import area_downsample_bwd_kernel, area_downsample_fwd_kernel

BWD_TILE = 1024, 16  # elements and rows of a program
OUT_ROWS = 4  # of a program: what depends on columns only is worked out once
SHORT_TOTAL = 2**31 // 255  # pixels whose bytes a 32-bit integer can add up


def area_downsample_triton(
    image: Tensor,  # (B, C, H, W), any strides
    size: tuple[int, int],
    *,
    means: list[float] | None,
    stds: list[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The view (B, C, h, w), with the channels last in memory if the image has them so. No gradient."""
    channels, in_height, in_width = image.shape[1:]
    compute = compute_dtype(image.dtype, dtype)
    affine = means is not None or stds is not None
    fused = affine and fits(means) and fits(stds) and compute == torch.float32
    memory_format = torch.channels_last if is_channels_last(image) else torch.contiguous_format
    out = torch.empty(
        (image.shape[0], channels, *size),
        dtype=compute if affine and not fused else dtype,
        device=image.device,
        memory_format=memory_format,
    )
    interleaved = _interleaved(image)
    contiguous = image.stride(3) == interleaved
    unit = _unit(image, interleaved) if contiguous else 1
    tile = fwd_tile(in_width, size[1], interleaved, unit, image.element_size())
    if tile.wide:
        interleaved, contiguous, unit = 1, image.stride(3) == 1, unit if interleaved == 1 else 1
    planes = 1 if interleaved > 1 else channels
    is_byte = image.dtype == torch.uint8
    tall = longest_bin(in_height, size[0])
    short = tall * longest_bin(in_width, size[1]) < SHORT_TOTAL
    float_type = tl.float64 if compute == torch.float64 else tl.float32
    grid = (image.shape[0] * planes * triton.cdiv(size[0], OUT_ROWS) * triton.cdiv(size[1], tile.columns),)
    with device_guard(image):
        area_downsample_fwd_kernel[grid](
            image,
            out,
            in_height,
            in_width,
            *size,
            tile.columns,
            *(stride // unit for stride in image.stride()[:3]),
            image.stride(3),
            *out.stride(),
            *padded(means if fused else None, 0.0),
            *padded(stds if fused else None, 1.0),
            PLANES=planes,
            INTERLEAVED=interleaved,
            CONTIGUOUS=contiguous,
            UNIT=unit,
            BYTES=is_byte,
            AFFINE=fused,
            COMPUTE=float_type,
            TOTAL=(tl.int32 if short else tl.int64) if is_byte else float_type,
            INDEX=_index_type(image.shape, size),
            WIDE=tile.wide,
            OUT_ROWS=OUT_ROWS,
            BLOCK_J=tile.block_j,
            BLOCK_K=tile.block_k,
            BLOCK_W=tile.block_w,
            ROWS=rows_in_flight(tall, tile, image.element_size(), unit, contiguous),
            num_warps=tile.num_warps,
        )
    if affine and not fused:
        _normalise_(out, means, stds)
    return out.to(dtype)


def area_downsample_backward_triton(
    grad_out: Tensor,  # (B, C, h, w), any strides
    grad_image: Tensor,  # (B, C, H, W), contiguous or channels-last, written
    *,
    stds: list[float] | None,
) -> None:
    """Write the gradient to the image: 1 / (bin's area · std) of the gradient of every output pixel it is part of."""
    batch, channels, in_height, in_width = grad_image.shape
    compute = compute_dtype(grad_out.dtype, grad_image.dtype)
    fused = stds is not None and fits(stds) and compute == torch.float32
    if stds is not None and not fused:
        grad_out = grad_out.to(compute, copy=True, memory_format=torch.contiguous_format)
        _normalise_(grad_out, None, stds)
    interleaved = channels if grad_image.stride(3) == channels else 1
    planes = channels // interleaved
    unit = _unit(grad_image, interleaved)
    block_w, rows = BWD_TILE
    grid = (batch * planes * triton.cdiv(in_height, rows) * triton.cdiv(in_width * interleaved, block_w),)
    with device_guard(grad_image):
        area_downsample_bwd_kernel[grid](
            grad_out,
            grad_image,
            in_height,
            in_width,
            *grad_out.shape[2:],
            *(stride // unit for stride in grad_image.stride()[:3]),
            *grad_out.stride(),
            *padded(stds if fused else None, 1.0),
            PLANES=planes,
            INTERLEAVED=interleaved,
            UNIT=unit,
            AFFINE=fused,
            COMPUTE=tl.float64 if compute == torch.float64 else tl.float32,
            INDEX=_index_type(grad_image.shape, grad_out.shape[2:]),
            BLOCK_W=block_w,
            ROWS=rows,
            num_warps=4,
        )


def _normalise_(view: Tensor, means: list[float] | None, stds: list[float] | None) -> None:
    """In place, by numbers that travel with the launches: a tensor of them would make the host wait for its copy."""
    for channel in range(view.shape[1]):
        if means is not None:
            view[:, channel].sub_(means[channel])
        if stds is not None:
            view[:, channel].div_(stds[channel])


def _interleaved(image: Tensor) -> int:
    """Channels that a row's elements alternate between; 1 where every channel is read by itself."""
    channels = image.shape[1]
    return channels if 1 < channels <= 4 and image.stride(1) == 1 and image.stride(3) == channels else 1


def _unit(image: Tensor, interleaved: int) -> int:
    """Elements of the widest load that begins every row and divides its length; see row_unit."""
    stride_c = image.stride(1) if interleaved == 1 else 0
    common = math.gcd(image.stride(0), stride_c, image.stride(2))
    return row_unit(image.shape[3] * interleaved, common, image.element_size())


def row_unit(length: int, strides: int, item: int) -> int:
    """Elements of a load, of rows of that many elements whose strides have a common divisor: one, four bytes of them,
    or 16 bytes where rows have 2,048. Each is a variant to compile, and short rows gain little by another."""
    for size in (16, 4) if length * item >= 2048 else (4,):
        if item < size and math.gcd(size // item, length, strides) == size // item:
            return size // item
    return 1


def longest_bin(length: int, bins: int) -> int:
    """Pixels of the longest of `bins` bins over `length` pixels."""
    # A bin begins up to (q − 1)/q into a pixel and ends s/q after a multiple of one, with s/q what length/bins is
    # beyond a whole number, so that it touches a further pixel, or two if s > 1.
    return length // bins + min(2, length % bins // math.gcd(length, bins))


class Tile(NamedTuple):
    """What a program of the forward works on; all but `columns` are compiled into the kernel."""

    wide: bool  # a bin may be wider than a tile
    columns: int  # output pixels
    block_j: int  # a power of two that holds them
    block_k: int  # a power of two that holds a bin's columns
    block_w: int  # elements of the image
    num_warps: int


def fwd_tile(in_width: int, out_width: int, interleaved: int, unit: int, item: int) -> Tile:
    """The tile for a ratio and a memory order. It depends on the ratio only by the power of two that holds a bin, and
    on no size: data sets of many sizes take few variants."""
    block_k = max(4, triton.next_power_of_2(longest_bin(in_width, out_width)))
    # Rows of units are long ones; in others, small tiles leave fewer lanes without work.
    block_w = min(2048, max(256, min(1024, 128 * unit), triton.next_power_of_2(8 * block_k * interleaved)))
    # What remains where first and last bin begin and end anyhow.
    columns = ((block_w - unit) // interleaved - 2) * out_width // in_width
    if columns < 1:
        return Tile(True, 1, 1, 1, 2048, 8)
    block_j = min(block_w, triton.next_power_of_2(max(1, 2 * block_w // (block_k * interleaved))))
    num_warps = min(8, max(2 if block_w > 256 else 1, block_w * item // 512))  # 16 bytes a thread and row
    return Tile(False, min(columns, out_width, block_j), block_j, block_k, block_w, num_warps)


def rows_in_flight(rows: int, tile: Tile, item: int, unit: int, contiguous: bool) -> int:
    """How many of a bin's rows a thread loads its elements of before it adds up: a power of two, 4 at most, in 64
    registers. Few rows that a bin does not have are then passed over, and bins of any height share a variant."""
    held = max(item, 4 if unit * item < 4 else 1) if contiguous else 8  # bytes an element: its value, or its address
    elements = tile.block_w // (32 * tile.num_warps)
    return min(4, triton.next_power_of_2(rows), max(1, 256 // (elements * held)))


def _index_type(image_shape: torch.Size, size: Sequence[int]) -> Any:
    """What holds the product of an image's side with a view's; a 64-bit division is worth avoiding."""
    largest = max(side * bins for side, bins in zip(image_shape[2:], size, strict=True))
    return tl.int32 if largest + max(image_shape[2:]) * 2048 < 2**31 else tl.int64
