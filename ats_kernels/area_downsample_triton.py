"""Triton kernels of `area_downsample`: one read of the image in wide loads, and the gradient in one write.

A program adds up the rows of one bin over a stretch of the image, in registers, then picks the columns of each of
its output pixels out of the sums. Bytes are summed as integers, exactly, whatever the bin's size.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ats_kernels._checks import compute_dtype, normalise
from ats_kernels._offline import OfflineCase

AFFINE_CHANNELS = 4  # whose mean and std travel as arguments of the launch
SHORT_TOTAL = 2**31 // 255  # pixels whose bytes a 32-bit integer can add up


@triton.jit
def _of_channel(channel, value_0, value_1, value_2, value_3):
    return tl.where(channel == 0, value_0, tl.where(channel == 1, value_1, tl.where(channel == 2, value_2, value_3)))


@triton.jit
def _bin_length(index, rest, length, bins):
    """Of bin ``index``, where bin 0 begins ``rest / bins`` into a pixel."""
    return ((index + 1) * length + rest + bins - 1) // bins - (index * length + rest) // bins


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
    WIDE: tl.constexpr,  # whether one bin may be longer than BLOCK_W
    COLUMNS: tl.constexpr,  # output pixels a program
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least a bin's columns
    BLOCK_W: tl.constexpr,  # at least the elements of the COLUMNS bins, or else WIDE
    ROWS: tl.constexpr,  # loads that a thread has in flight
):
    # One program computes COLUMNS neighbouring output pixels of one output row, in all interleaved channels.
    program = tl.program_id(0)
    tiles = (out_width + COLUMNS - 1) // COLUMNS
    i = program // tiles % out_height
    plane = program // tiles // out_height
    channel = plane % PLANES
    batch = (plane // PLANES).to(tl.int64)
    first = program % tiles * COLUMNS

    # Products of an index and a size may exceed 32 bits, those relative to the program's first column do not.
    top = i.to(tl.int64) * in_height // out_height
    rows = (((i + 1).to(tl.int64) * in_height + out_height - 1) // out_height - top).to(tl.int32)
    product = first.to(tl.int64) * in_width
    left = product // out_width
    rest = (product - left * out_width).to(tl.int32)
    j = tl.arange(0, BLOCK_J)
    starts = (j * in_width + rest) // out_width  # columns right of `left`
    lengths = _bin_length(j, rest, in_width, out_width)

    # Loads begin at a whole unit; `skipped` elements of it belong to the bin before.
    begin = left * INTERLEAVED // UNIT * UNIT
    skipped = (left * INTERLEAVED - begin).to(tl.int32)
    row_end = in_width * INTERLEAVED // UNIT * UNIT
    image_ptr += (batch * units_image_b + channel.to(tl.int64) * units_image_c + top * units_image_h) * UNIT
    index = tl.arange(0, BLOCK_W)
    if BYTES:
        sums = tl.zeros((BLOCK_W,), tl.int32)
    else:
        sums = tl.zeros((BLOCK_W,), COMPUTE)
    if WIDE:  # then there is one bin: add all of its stretches onto each other
        bin_end = skipped + ((first + 1).to(tl.int64) * in_width + out_width - 1) // out_width - left
        for offset in range(0, bin_end.to(tl.int32), BLOCK_W):
            column = begin + offset + index
            in_bin = (offset + index >= skipped) & (offset + index < bin_end)
            for start in range(0, rows, ROWS):
                for step in tl.static_range(ROWS):
                    row = start + step
                    mask = (column < row_end) & (row < rows)
                    if CONTIGUOUS:
                        pixel_ptrs = image_ptr + row.to(tl.int64) * units_image_h * UNIT + column
                    else:
                        pixel_ptrs = image_ptr + row.to(tl.int64) * units_image_h * UNIT + column * stride_image_w
                    pixels = tl.load(pixel_ptrs, mask=mask, other=0)
                    sums += tl.where(in_bin, pixels, 0).to(sums.dtype)
    else:
        column = begin + index
        for start in range(0, rows, ROWS):
            for step in tl.static_range(ROWS):
                row = start + step
                mask = (column < row_end) & (row < rows)
                if CONTIGUOUS:
                    pixel_ptrs = image_ptr + row.to(tl.int64) * units_image_h * UNIT + column
                else:
                    pixel_ptrs = image_ptr + row.to(tl.int64) * units_image_h * UNIT + column * stride_image_w
                sums += tl.load(pixel_ptrs, mask=mask, other=0).to(sums.dtype)

    # The integer that a white bin adds up to is converted like the sum: white is exactly 1.
    area = rows.to(TOTAL if BYTES else tl.int64) * lengths
    if BYTES:
        area *= 255
    out_ptr += batch * stride_out_b + i.to(tl.int64) * stride_out_h
    for interleaved in tl.static_range(INTERLEAVED):
        if WIDE:
            total = tl.sum(sums.to(TOTAL), axis=0) + tl.zeros((BLOCK_J,), TOTAL)
        else:
            k = tl.arange(0, BLOCK_K)[None, :]
            picked = (starts[:, None] + k) * INTERLEAVED + interleaved + skipped
            picked = tl.reshape(tl.minimum(picked, BLOCK_W - 1), (BLOCK_J * BLOCK_K,))
            columns = tl.reshape(tl.gather(sums, picked, 0), (BLOCK_J, BLOCK_K))
            total = tl.sum(tl.where(k < lengths[:, None], columns, 0).to(TOTAL), axis=1)
        if COMPUTE == tl.float64:
            view = total.to(COMPUTE) / area.to(COMPUTE)
        else:
            view = tl.div_rn(total.to(COMPUTE), area.to(COMPUTE))
        c = channel + interleaved
        if AFFINE:
            mean = _of_channel(c, mean_0, mean_1, mean_2, mean_3)
            view = tl.div_rn(view - mean, _of_channel(c, std_0, std_1, std_2, std_3) + tl.zeros_like(view))
        out_ptrs = out_ptr + c.to(tl.int64) * stride_out_c + (first + j).to(tl.int64) * stride_out_w
        tl.store(out_ptrs, view.to(out_ptr.dtype.element_ty), mask=(j < COLUMNS) & (first + j < out_width))


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
    BLOCK_W: tl.constexpr,
    ROWS: tl.constexpr,
):
    # One program writes BLOCK_W elements of ROWS rows. A pixel lies in one bin or in two neighbouring ones, along
    # each axis, and gathers from these: nothing is added in memory, so the result is always the same.
    program = tl.program_id(0)
    tiles = (in_width * INTERLEAVED + BLOCK_W - 1) // BLOCK_W
    groups = (in_height + ROWS - 1) // ROWS
    begin = program % tiles * BLOCK_W
    top = program // tiles % groups * ROWS
    plane = program // tiles // groups
    batch = (plane // PLANES).to(tl.int64)

    index = tl.arange(0, BLOCK_W)
    element = begin + index
    # The bins ⌊x·w/W⌋ to ⌈(x + 1)·w/W⌉ − 1 hold column x. Relative to the program's first ones, to fit in 32 bits.
    x = (index + begin % INTERLEAVED) // INTERLEAVED
    channel = plane % PLANES + element % INTERLEAVED
    product = (begin // INTERLEAVED).to(tl.int64) * out_width
    j_begin = product // in_width
    rest = (product - j_begin * in_width).to(tl.int32)
    j = (x * out_width + rest) // in_width
    next_j = ((x + 1) * out_width + rest + in_width - 1) // in_width - 1
    rest = (j_begin * in_width % out_width).to(tl.int32)
    factor = 1.0 / _bin_length(j, rest, in_width, out_width).to(COMPUTE)
    next_factor = 1.0 / _bin_length(next_j, rest, in_width, out_width).to(COMPUTE)
    if AFFINE:
        std = _of_channel(channel, std_0, std_1, std_2, std_3).to(COMPUTE)
        factor /= std
        next_factor /= std

    valid = element < in_width * INTERLEAVED // UNIT * UNIT
    shared = valid & (next_j > j)
    grad_out_ptr += batch * stride_out_b + channel.to(tl.int64) * stride_out_c
    column_ptrs = grad_out_ptr + (j_begin + j) * stride_out_w
    next_column_ptrs = grad_out_ptr + (j_begin + next_j) * stride_out_w
    grad_image_ptr += (batch * units_image_b + (plane % PLANES).to(tl.int64) * units_image_c) * UNIT
    for step in range(0, ROWS):
        y = (top + step).to(tl.int64)
        inside = y < in_height
        first_i = y * out_height // in_height
        last_i = ((y + 1) * out_height + in_height - 1) // in_height - 1
        grad_image = tl.zeros((BLOCK_W,), COMPUTE)
        for following in tl.static_range(2):
            i = first_i + following
            held = inside & (i <= last_i)
            rows = _bin_length(i, 0, in_height, out_height)
            grad_out = tl.load(column_ptrs + i * stride_out_h, mask=valid & held, other=0).to(COMPUTE)
            next_grad_out = tl.load(next_column_ptrs + i * stride_out_h, mask=shared & held, other=0).to(COMPUTE)
            grad_image += (grad_out * factor + next_grad_out * next_factor) / rows.to(COMPUTE)
        grad_image_ptrs = grad_image_ptr + y * units_image_h * UNIT + element
        tl.store(grad_image_ptrs, grad_image.to(grad_image_ptr.dtype.element_ty), mask=valid & inside)


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
    grid = (image.shape[0] * planes * size[0] * triton.cdiv(size[1], columns),)
    with torch.cuda.device_of(image):
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
            WIDE=wide,
            COLUMNS=columns,
            BLOCK_J=triton.next_power_of_2(columns),
            BLOCK_K=1 if wide else triton.next_power_of_2(longest),
            BLOCK_W=block_w,
            ROWS=min(tall, 16),
            num_warps=num_warps,
        )
    if affine and not fused:
        out = normalise(out, means, stds, channel_dim=1, is_byte=False).to(dtype)
    return out


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
        grad_out = normalise(grad_out.to(compute), None, stds, channel_dim=1, is_byte=False)
    interleaved = channels if grad_image.stride(3) == channels else 1
    planes = channels // interleaved
    unit = _unit(grad_image, interleaved)
    block_w, rows = 512, 16
    grid = (batch * planes * triton.cdiv(in_height, rows) * triton.cdiv(in_width * interleaved, block_w),)
    with torch.cuda.device_of(grad_image):
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
            BLOCK_W=block_w,
            ROWS=rows,
            num_warps=4,
        )


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
    for block_w in (128, 256, 512, 1024, 2048):
        pixels = (block_w - unit) // interleaved - 2  # what remains where first and last bin begin and end anyhow
        columns = min(128, out_width, pixels * out_width // in_width)
        if columns > 0:
            fits.append((triton.cdiv(out_width, columns) * block_w, -block_w, columns))
    # The tile that leaves the fewest lanes without work, among equals the largest.
    _, block_w, columns = min(fits, default=(0, -2048, 1))
    return not fits, columns, -block_w, min(8, max(1, -block_w * item // 512))  # 16 bytes a thread and row


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
                    "WIDE": False,
                    "COLUMNS": columns,
                    "BLOCK_J": triton.next_power_of_2(columns),
                    "BLOCK_K": triton.next_power_of_2(longest),
                    "BLOCK_W": block_w,
                    "ROWS": min(longest, 16),
                },
                divisible_by_16=("image_ptr", "out_ptr"),
                num_warps=num_warps,
                elements=columns * interleaved * side // view * longest,
                bytes_per_element=item + 4 * (view / side) ** 2,
                budget=14,
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
                    "BLOCK_W": 512,
                    "ROWS": 16,
                },
                divisible_by_16=("grad_out_ptr", "grad_image_ptr"),
                num_warps=4,
                elements=512,
                bytes_per_element=item + item * (view / side) ** 2,
                budget=40,
                needs=(r"st\.global\S*\.v[24]\.b32",),
                workload=workload,
            )
        )
    return cases
