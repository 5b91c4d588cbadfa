"""Triton kernels of `area_downsample`: one read of the image in wide loads, and the gradient in one write.

A program adds up the rows of one bin over a stretch of the image, in registers, then picks the columns of each of
its output pixels out of the sums. Bytes are summed as integers, exactly, whatever the bin's size.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ats_kernels._backend import device_guard
from ats_kernels._checks import compute_dtype
from ats_kernels._offline import OfflineCase

AFFINE_CHANNELS = 4  # whose mean and std travel as arguments of the launch
BWD_TILE = 1024, 16  # elements and rows of a program
OUT_ROWS = 4  # of a program: what depends on columns only is worked out once
SHORT_TOTAL = 2**31 // 255  # pixels whose bytes a 32-bit integer can add up


@triton.jit
def _of_channel(channel, value_0, value_1, value_2, value_3):
    return tl.where(channel == 0, value_0, tl.where(channel == 1, value_1, tl.where(channel == 2, value_2, value_3)))


@triton.jit
def _bin_length(rest, length, bins):
    """Of a bin that begins ``rest / bins`` into a pixel: ⌈(rest + length) / bins⌉, without a division a bin."""
    beyond = rest + length % bins
    return length // bins + (beyond > 0).to(tl.int32) + (beyond > bins).to(tl.int32)


@triton.jit
def _next_rest(rest, length, bins):
    """Of the bin after."""
    beyond = rest + length % bins
    return tl.where(beyond >= bins, beyond - bins, beyond)


@triton.jit
def _area_downsample_fwd_kernel(
    image_ptr,  # (B, C, H, W)
    out_ptr,  # (B, C, h, w), written
    in_height,
    in_width,
    out_height,
    out_width,
    units_image_b,  # strides in units of UNIT elements
    units_image_c,
    units_image_h,
    stride_image_w,
    stride_out_b,
    stride_out_c,
    stride_out_h,
    stride_out_w,
    mean_0,
    mean_1,
    mean_2,
    mean_3,
    std_0,
    std_1,
    std_2,
    std_3,
    PLANES: tl.constexpr,  # of an image that are read apart: its channels, or 1 where they are interleaved
    INTERLEAVED: tl.constexpr,  # channels that lie beside each other: all of them in channels-last, else 1
    CONTIGUOUS: tl.constexpr,  # whether the elements of a row follow one another in memory
    UNIT: tl.constexpr,  # elements that a row's length and all strides are multiples of
    BYTES: tl.constexpr,
    AFFINE: tl.constexpr,
    COMPUTE: tl.constexpr,
    TOTAL: tl.constexpr,  # type of a bin's sum
    INDEX: tl.constexpr,  # type of a product of two sizes
    WIDE: tl.constexpr,  # whether a bin may be longer than BLOCK_W
    COLUMNS: tl.constexpr,  # output pixels a row of a program
    OUT_ROWS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least a bin's columns
    BLOCK_W: tl.constexpr,  # at least the elements of COLUMNS bins, or else WIDE
    ROWS: tl.constexpr,  # loads that a thread has in flight
):
    # One program computes COLUMNS neighbouring pixels of OUT_ROWS output rows, in all interleaved channels.
    program = tl.program_id(0)
    tiles = (out_width + COLUMNS - 1) // COLUMNS
    groups = (out_height + OUT_ROWS - 1) // OUT_ROWS
    plane = program // tiles // groups
    channel = plane % PLANES
    batch = (plane // PLANES).to(tl.int64)

    # Columns relative to that where the program's first bin begins.
    first = program % tiles * COLUMNS
    product = first.to(INDEX) * in_width
    left = product // out_width
    j = tl.arange(0, BLOCK_J)
    product = j * in_width + (product - left * out_width).to(tl.int32)
    starts = product // out_width
    lengths = _bin_length(product - starts * out_width, in_width, out_width)
    # Loads begin at a whole unit; `skipped` elements of it belong to the bin before.
    begin = left * INTERLEAVED // UNIT * UNIT
    skipped = (left * INTERLEAVED - begin).to(tl.int32)
    end = skipped + tl.sum(tl.where(j == 0, lengths, 0), axis=0)  # of the one bin of a WIDE program
    row_end = in_width * INTERLEAVED // UNIT * UNIT
    image_ptr += (batch * units_image_b + channel.to(tl.int64) * units_image_c) * UNIT
    index = tl.arange(0, BLOCK_W)
    k = tl.arange(0, BLOCK_K)[:, None]

    first_i = program // tiles % groups * OUT_ROWS
    product = first_i.to(INDEX) * in_height
    top = product // out_height
    rest = (product - top * out_height).to(tl.int32)
    top = top.to(tl.int64)
    for out_row in range(OUT_ROWS):
        i = first_i + out_row
        rows = _bin_length(rest, in_height, out_height)
        rows_read = tl.where(i < out_height, rows, 0)
        sums = tl.zeros((BLOCK_W,), tl.int32 if BYTES else COMPUTE)
        for offset in range(0, end if WIDE else 1, BLOCK_W):  # a WIDE program adds its stretches onto each other
            column = begin + offset + index
            in_row = column < row_end
            place = column if CONTIGUOUS else column.to(tl.int64) * stride_image_w
            for start in range(0, rows_read, ROWS):
                for step in tl.static_range(ROWS):
                    row_ptr = image_ptr + (top + start + step) * units_image_h * UNIT
                    pixels = tl.load(row_ptr + place, mask=in_row & (start + step < rows_read), other=0)
                    if WIDE:
                        pixels = tl.where((offset + index >= skipped) & (offset + index < end), pixels, 0)
                    sums += pixels.to(sums.dtype)

        # The integer that a white bin adds up to is converted as the sum is: white is exactly 1.
        area = rows.to(TOTAL if BYTES else tl.int64) * lengths
        if BYTES:
            area *= 255
        out_row_ptr = out_ptr + batch * stride_out_b + i.to(tl.int64) * stride_out_h
        for interleaved in tl.static_range(INTERLEAVED):
            if WIDE:
                total = tl.sum(sums.to(TOTAL), axis=0) + tl.zeros((BLOCK_J,), TOTAL)
            else:
                picked = tl.minimum((starts[None, :] + k) * INTERLEAVED + interleaved + skipped, BLOCK_W - 1)
                columns = tl.gather(sums, tl.reshape(picked, (BLOCK_K * BLOCK_J,)), 0)
                columns = tl.where(k < lengths[None, :], tl.reshape(columns, (BLOCK_K, BLOCK_J)), 0)
                total = tl.sum(columns.to(TOTAL), axis=0)
            if COMPUTE == tl.float64:  # noqa: SIM300
                view = total.to(COMPUTE) / area.to(COMPUTE)
            else:
                view = tl.div_rn(total.to(COMPUTE), area.to(COMPUTE))
            c = channel + interleaved
            if AFFINE:
                mean = _of_channel(c, mean_0, mean_1, mean_2, mean_3)
                std = _of_channel(c, std_0, std_1, std_2, std_3)
                view = tl.div_rn(view - mean, std + tl.zeros_like(view))
            out_ptrs = out_row_ptr + c.to(tl.int64) * stride_out_c + (first + j).to(tl.int64) * stride_out_w
            in_view = (j < COLUMNS) & (first + j < out_width) & (i < out_height)
            tl.store(out_ptrs, view.to(out_ptr.dtype.element_ty), mask=in_view)

        next_rest = _next_rest(rest, in_height, out_height)
        top += in_height // out_height + (next_rest < rest).to(tl.int32)
        rest = next_rest


@triton.jit
def _area_downsample_bwd_kernel(
    grad_out_ptr,  # (B, C, h, w)
    grad_image_ptr,  # (B, C, H, W), written
    in_height,
    in_width,
    out_height,
    out_width,
    units_image_b,  # strides in units of UNIT elements
    units_image_c,
    units_image_h,
    stride_out_b,
    stride_out_c,
    stride_out_h,
    stride_out_w,
    std_0,
    std_1,
    std_2,
    std_3,
    PLANES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UNIT: tl.constexpr,
    AFFINE: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ROWS: tl.constexpr,
):
    # One program writes BLOCK_W elements of ROWS rows. A pixel lies in one bin or in two neighbouring ones, along
    # each axis, and gathers from these: nothing is added in memory, so the result is always the same.
    program = tl.program_id(0)
    tiles = (in_width * INTERLEAVED + BLOCK_W - 1) // BLOCK_W
    groups = (in_height + ROWS - 1) // ROWS
    plane = program // tiles // groups
    batch = (plane // PLANES).to(tl.int64)

    # Column x lies in bin j = ⌊x·w/W⌋, and in the next one too if that begins before x + 1. Bins relative to j_begin.
    begin = program % tiles * BLOCK_W
    index = tl.arange(0, BLOCK_W)
    element = begin + index
    channel = plane % PLANES + element % INTERLEAVED
    product = (begin // INTERLEAVED).to(INDEX) * out_width
    j_begin = product // in_width
    product = (index + begin % INTERLEAVED) // INTERLEAVED * out_width + (product - j_begin * in_width).to(tl.int32)
    j = product // in_width
    two_columns = product - j * in_width + out_width > in_width
    rest = (j * in_width + (j_begin * in_width % out_width).to(tl.int32)) % out_width
    factor = 1.0 / _bin_length(rest, in_width, out_width).to(COMPUTE)
    next_factor = 1.0 / _bin_length(_next_rest(rest, in_width, out_width), in_width, out_width).to(COMPUTE)
    if AFFINE:
        std = _of_channel(channel, std_0, std_1, std_2, std_3).to(COMPUTE)
        factor /= std
        next_factor /= std

    in_row = element < in_width * INTERLEAVED // UNIT * UNIT
    two_columns &= in_row
    column_ptrs = grad_out_ptr + batch * stride_out_b + channel.to(tl.int64) * stride_out_c
    column_ptrs += (j_begin + j).to(tl.int64) * stride_out_w
    grad_image_ptr += (batch * units_image_b + (plane % PLANES).to(tl.int64) * units_image_c) * UNIT

    first_y = program // tiles % groups * ROWS
    product = first_y.to(INDEX) * out_height
    i = product // in_height
    passed = (product - i * in_height).to(tl.int32)  # how far row y has come through bin i, in 1/h of a row
    rest = (i * in_height % out_height).to(tl.int32)
    i = i.to(tl.int64)
    for step in range(ROWS):
        y = first_y + step
        inside = y < in_height
        two_rows = inside & (passed + out_height > in_height)
        next_rest = _next_rest(rest, in_height, out_height)
        upper_ptrs = column_ptrs + i * stride_out_h
        lower_ptrs = upper_ptrs + stride_out_h
        upper = tl.load(upper_ptrs, mask=in_row & inside, other=0).to(COMPUTE) * factor
        upper += tl.load(upper_ptrs + stride_out_w, mask=two_columns & inside, other=0).to(COMPUTE) * next_factor
        lower = tl.load(lower_ptrs, mask=in_row & two_rows, other=0).to(COMPUTE) * factor
        lower += tl.load(lower_ptrs + stride_out_w, mask=two_columns & two_rows, other=0).to(COMPUTE) * next_factor
        grad_image = upper * (1.0 / _bin_length(rest, in_height, out_height).to(COMPUTE))
        grad_image += lower * (1.0 / _bin_length(next_rest, in_height, out_height).to(COMPUTE))
        grad_image_ptrs = grad_image_ptr + y.to(tl.int64) * units_image_h * UNIT + element
        tl.store(grad_image_ptrs, grad_image.to(grad_image_ptr.dtype.element_ty), mask=in_row & inside)

        passed += out_height
        carry = passed >= in_height
        passed = tl.where(carry, passed - in_height, passed)
        rest = tl.where(carry, next_rest, rest)
        i += carry.to(tl.int64)


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
    fused = affine and channels <= AFFINE_CHANNELS and compute == torch.float32
    memory_format = torch.channels_last if _channels_last(image) else torch.contiguous_format
    out = torch.empty(
        (image.shape[0], channels, *size),
        dtype=compute if affine and not fused else dtype,
        device=image.device,
        memory_format=memory_format,
    )
    interleaved = _interleaved(image)
    contiguous = image.stride(3) == interleaved
    unit = _unit(image, interleaved) if contiguous else 1
    longest = _longest_bin(in_width, size[1])
    wide, columns, block_w, num_warps = _fwd_blocks(in_width, size[1], interleaved, unit, image.element_size())
    if wide:
        interleaved, contiguous, unit = 1, image.stride(3) == 1, unit if interleaved == 1 else 1
    planes = 1 if interleaved > 1 else channels
    is_byte = image.dtype == torch.uint8
    tall = _longest_bin(in_height, size[0])
    short = tall * longest < SHORT_TOTAL
    float_type = tl.float64 if compute == torch.float64 else tl.float32
    grid = (image.shape[0] * planes * triton.cdiv(size[0], OUT_ROWS) * triton.cdiv(size[1], columns),)
    with device_guard(image):
        _area_downsample_fwd_kernel[grid](
            image,
            out,
            in_height,
            in_width,
            *size,
            *(stride // unit for stride in image.stride()[:3]),
            image.stride(3),
            *out.stride(),
            *_padded(means if fused else None, 0.0),
            *_padded(stds if fused else None, 1.0),
            PLANES=planes,
            INTERLEAVED=interleaved,
            CONTIGUOUS=contiguous,
            UNIT=unit,
            BYTES=is_byte,
            AFFINE=fused,
            COMPUTE=float_type,
            TOTAL=(tl.int32 if short else tl.int64) if is_byte else float_type,
            INDEX=_index_type(image.shape, size),
            WIDE=wide,
            COLUMNS=columns,
            OUT_ROWS=OUT_ROWS,
            BLOCK_J=triton.next_power_of_2(columns),
            BLOCK_K=1 if wide else triton.next_power_of_2(longest),
            BLOCK_W=block_w,
            ROWS=min(tall, _rows_in_flight(block_w // (32 * num_warps), image.element_size(), unit, contiguous)),
            num_warps=num_warps,
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
    fused = stds is not None and channels <= AFFINE_CHANNELS and compute == torch.float32
    if stds is not None and not fused:
        grad_out = grad_out.to(compute, copy=True, memory_format=torch.contiguous_format)
        _normalise_(grad_out, None, stds)
    interleaved = channels if grad_image.stride(3) == channels else 1
    planes = channels // interleaved
    unit = _unit(grad_image, interleaved)
    block_w, rows = BWD_TILE
    grid = (batch * planes * triton.cdiv(in_height, rows) * triton.cdiv(in_width * interleaved, block_w),)
    with device_guard(grad_image):
        _area_downsample_bwd_kernel[grid](
            grad_out,
            grad_image,
            in_height,
            in_width,
            *grad_out.shape[2:],
            *(stride // unit for stride in grad_image.stride()[:3]),
            *grad_out.stride(),
            *_padded(stds if fused else None, 1.0),
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


def _channels_last(image: Tensor) -> bool:
    return image.shape[1] > 1 and 0 < image.stride(1) < image.stride(3)


def _interleaved(image: Tensor) -> int:
    """Channels that a row's elements alternate between; 1 where every channel is read by itself."""
    channels = image.shape[1]
    return channels if 1 < channels <= 4 and image.stride(1) == 1 and image.stride(3) == channels else 1


def _unit(image: Tensor, interleaved: int) -> int:
    """Elements of the widest load, 16 bytes at most, that begins every row and divides its length."""
    widest = 16 // image.element_size()
    stride_c = image.stride(1) if interleaved == 1 else 0
    return math.gcd(widest, image.shape[3] * interleaved, image.stride(0), stride_c, image.stride(2))


def _longest_bin(length: int, bins: int) -> int:
    # A bin begins up to (q − 1)/q into a pixel and ends s/q after a multiple of one, with s/q what length/bins is
    # beyond a whole number, so that it touches a further pixel, or two if s > 1.
    return length // bins + min(2, length % bins // math.gcd(length, bins))


def _fwd_blocks(in_width: int, out_width: int, interleaved: int, unit: int, item: int) -> tuple[bool, int, int, int]:
    """Whether a bin may be wider than a tile; output pixels a program, elements of its tile, and warps."""
    fits = []
    for block_w in (256, 512, 1024, 2048):
        pixels = (block_w - unit) // interleaved - 2  # what remains where first and last bin begin and end anyhow
        columns = min(128, out_width, pixels * out_width // in_width)
        if columns > 0:
            fits.append((triton.cdiv(out_width, columns) * block_w, -block_w, columns))
    # The tile that leaves the fewest lanes without work, among equals the largest.
    _, block_w, columns = min(fits, default=(0, -2048, 1))
    num_warps = min(8, max(2, -block_w * item // 512)) if fits else 8  # 16 bytes a thread and row
    return not fits, columns, -block_w, num_warps


def _rows_in_flight(elements: int, item: int, unit: int, contiguous: bool) -> int:
    """Rows of which a thread may load its elements before it adds them up: what fits in 64 registers, 16 at most."""
    held = max(item, 4 if unit * item < 4 else 1) if contiguous else 8  # bytes an element: its value, or its address
    return min(16, max(1, 256 // (elements * held)))


def _index_type(image_shape: torch.Size, size: Sequence[int]) -> Any:
    """What holds the product of an image's side with a view's; a 64-bit division is worth avoiding."""
    largest = max(side * bins for side, bins in zip(image_shape[2:], size, strict=True))
    return tl.int32 if largest + max(image_shape[2:]) * 2048 < 2**31 else tl.int64


def _padded(values: list[float] | None, default: float) -> list[float]:
    values = values or []
    return values + [default] * (AFFINE_CHANNELS - len(values))


def offline_cases() -> list[OfflineCase]:
    """The MNIST and gigapixel views, whose rows are multiples of 4 and of 16 bytes, and a float image's gradient."""
    launches = [  # name, image, H = W, h = w, channels, interleaved, workload
        ("uint8 1500 -> 180", "u8", 1500, 180, 1, 1, ("MNIST", 128 * 1500**2)),
        ("uint8 40000 -> 4096", "u8", 40000, 4096, 3, 1, ("gigapixel", 3 * 40000**2)),
        ("uint8 40000 -> 4096 NHWC", "u8", 40000, 4096, 3, 3, ("gigapixel", 3 * 40000**2)),
        ("bf16 1280 -> 384", "bf16", 1280, 384, 3, 1, ("signs", 32 * 3 * 960 * 1280)),
        ("fp32 1280 -> 384", "fp32", 1280, 384, 3, 1, ("signs", 32 * 3 * 960 * 1280)),
    ]
    cases = []
    for name, image, side, view, channels, interleaved, workload in launches:
        item = {"u8": 1, "bf16": 2, "fp32": 4}[image]
        unit = math.gcd(16 // item, side * interleaved)
        _, columns, block_w, num_warps = _fwd_blocks(side, view, interleaved, unit, item)
        longest = _longest_bin(side, view)
        sizes = dict.fromkeys(("in_height", "in_width", "out_height", "out_width"), "i32")
        strides = dict.fromkeys(("units_image_b", "units_image_c", "units_image_h"), "i32")
        out_strides = dict.fromkeys(("stride_out_b", "stride_out_c", "stride_out_h"), "i32")
        constants = {f"{what}_{c}": "fp32" for what in ("mean", "std") for c in range(AFFINE_CHANNELS)}
        layout = {"PLANES": channels // interleaved, "INTERLEAVED": interleaved, "UNIT": unit}
        cases.append(
            OfflineCase(
                name=f"fwd {name}",
                kernel=_area_downsample_fwd_kernel,
                signature={
                    "image_ptr": f"*{image}",
                    "out_ptr": "*fp32",
                    **sizes,
                    **strides,
                    "stride_image_w": "i32",
                    **out_strides,
                    "stride_out_w": "i32",
                    **constants,
                },
                constexprs={
                    **layout,
                    "CONTIGUOUS": True,
                    "BYTES": image == "u8",
                    "AFFINE": True,
                    "COMPUTE": tl.float32,
                    "TOTAL": tl.int32 if image == "u8" else tl.float32,
                    "INDEX": tl.int32,
                    "WIDE": False,
                    "COLUMNS": columns,
                    "OUT_ROWS": OUT_ROWS,
                    "BLOCK_J": triton.next_power_of_2(columns),
                    "BLOCK_K": triton.next_power_of_2(longest),
                    "BLOCK_W": block_w,
                    "ROWS": min(longest, _rows_in_flight(block_w // (32 * num_warps), item, unit, True)),
                },
                divisible_by_16=("image_ptr", "out_ptr"),
                num_warps=num_warps,
                elements=columns * interleaved * side // view * longest,
                bytes_per_element=item + 4 * (view / side) ** 2,
                # What depends on columns only counts whole, though it runs once for OUT_ROWS rows.
                budget=14 if image == "u8" else 50,
                needs=(r"ld\.global\S*\.v4\.b32",) if unit * item == 16 else (r"ld\.global\S*\.b32",),
                workload=workload,
            )
        )
        if image == "u8":
            continue
        cases.append(
            OfflineCase(
                name=f"bwd {name}",
                kernel=_area_downsample_bwd_kernel,
                signature={
                    "grad_out_ptr": f"*{image}",
                    "grad_image_ptr": f"*{image}",
                    **sizes,
                    **strides,
                    **out_strides,
                    **{name: kind for name, kind in constants.items() if name.startswith("std")},
                },
                constexprs={
                    "stride_out_w": 1,
                    **layout,
                    "AFFINE": True,
                    "COMPUTE": tl.float32,
                    "INDEX": tl.int32,
                    "BLOCK_W": BWD_TILE[0],
                    "ROWS": BWD_TILE[1],
                },
                divisible_by_16=("grad_out_ptr", "grad_image_ptr"),
                num_warps=4,
                elements=BWD_TILE[0],
                bytes_per_element=item + item * (view / side) ** 2,
                budget=155,  # of which 120 are the columns' code, run once for all rows of a tile
                needs=(r"st\.global\S*\.v[24]\.b32",),
                workload=workload,
            )
        )
    return cases
