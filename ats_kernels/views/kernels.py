"""Triton kernels of `area_downsample`: one read of the image in wide loads, and the gradient in one write.

A program adds up the rows of one bin over a stretch of the image, in registers, then picks the columns of each of
its output pixels out of the sums. Bytes are summed as integers, exactly, whatever the bin's size.
"""

import triton
import triton.language as tl

from ats_kernels.device import of_channel

# What nothing is gained from knowing more closely must not start another compilation: a data set has many sizes.
_SIZES = (
    "in_height", "in_width", "out_height", "out_width", "out_columns", "units_image_b", "units_image_c",
    "units_image_h", "stride_image_w", "stride_out_b", "stride_out_c", "stride_out_h",
)  # fmt: skip


@triton.jit
def _bin_length(rest, length, bins):
    """Pixels of a bin that begins ``rest / bins`` into a pixel: ⌈(rest + length) / bins⌉, without a division a bin."""
    beyond = rest + length % bins
    return length // bins + (beyond > 0).to(tl.int32) + (beyond > bins).to(tl.int32)


@triton.jit
def _next_rest(rest, length, bins):
    """How far into a pixel the bin after begins, times ``bins``."""
    beyond = rest + length % bins
    return tl.where(beyond >= bins, beyond - bins, beyond)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=("stride_out_w",))
def area_downsample_fwd_kernel(
    image_ptr,  # (B, C, H, W)
    out_ptr,  # (B, C, h, w), written
    in_height,
    in_width,
    out_height,
    out_width,
    out_columns,  # output pixels a row of a program
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
    OUT_ROWS: tl.constexpr,
    BLOCK_J: tl.constexpr,  # at least out_columns
    BLOCK_K: tl.constexpr,  # at least a bin's columns
    BLOCK_W: tl.constexpr,  # at least the elements of out_columns bins, or else WIDE
    ROWS: tl.constexpr,  # loads that a thread has in flight
):
    """One program computes out_columns neighbouring pixels of OUT_ROWS output rows, in all interleaved channels."""
    program = tl.program_id(0)
    tiles = (out_width + out_columns - 1) // out_columns
    groups = (out_height + OUT_ROWS - 1) // OUT_ROWS
    plane = program // tiles // groups
    channel = plane % PLANES
    batch = (plane // PLANES).to(tl.int64)

    # Columns relative to that where the program's first bin begins.
    first = program % tiles * out_columns
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
    # Where the last bin ends, up to a whole unit: what lies behind it is not read.
    product = tl.minimum(first + out_columns, out_width).to(INDEX) * in_width
    right = (product + out_width - 1) // out_width
    row_end = (right.to(tl.int32) * INTERLEAVED + UNIT - 1) // UNIT * UNIT
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
                # A compiler of whole models passes Python's floats as float64.
                mean = of_channel(c, mean_0, mean_1, mean_2, mean_3).to(COMPUTE)
                std = of_channel(c, std_0, std_1, std_2, std_3).to(COMPUTE)
                view = tl.div_rn(view - mean, std + tl.zeros_like(view))
            out_ptrs = out_row_ptr + c.to(tl.int64) * stride_out_c + (first + j).to(tl.int64) * stride_out_w
            in_view = (j < out_columns) & (first + j < out_width) & (i < out_height)
            tl.store(out_ptrs, view.to(out_ptr.dtype.element_ty), mask=in_view)

        next_rest = _next_rest(rest, in_height, out_height)
        top += in_height // out_height + (next_rest < rest).to(tl.int32)
        rest = next_rest


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=("stride_out_w",))
def area_downsample_bwd_kernel(
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
    """One program writes BLOCK_W elements of ROWS rows. A pixel lies in one bin or in two neighbouring ones, along each
    axis, and gathers from these: nothing is added in memory, so the result is always the same."""
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
        std = of_channel(channel, std_0, std_1, std_2, std_3).to(COMPUTE)
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
